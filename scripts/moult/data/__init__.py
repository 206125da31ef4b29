"""From files to rows: formats, conversations, languages. Knows no model."""
