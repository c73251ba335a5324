"""The base model: its facts (no weights loaded), its tokenizer, and loading it."""
