"""Turning the caller's data into model inputs, and running them through a model while its FFNs are watched."""
