"""Training on the models that serve: packed rows in, a checkpoint out."""
