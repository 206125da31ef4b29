"""A model's folder: its files, tokenizer, template, LoRA targets, and how it is loaded."""
