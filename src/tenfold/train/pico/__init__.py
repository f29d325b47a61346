"""pico, the built-in model: its corpus, its vocabulary and its recipe."""
