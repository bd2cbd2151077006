"""A model, a text, and how good the model is on it."""
