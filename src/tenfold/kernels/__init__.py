"""The operations that models are made of, each with a plain reference next to its fast versions."""
