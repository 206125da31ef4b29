"""The pages that people look at: one layout, one stylesheet, charts. They are made of the JSON files that the stages write."""
