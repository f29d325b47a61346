"""Small fakes for tests: a tiny checkpoint, a byte tokenizer, and an engine that follows a script."""
