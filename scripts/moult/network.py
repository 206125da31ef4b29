"""How Moult reaches the hub: TLS, tokens, and errors in plain words. In one place."""
