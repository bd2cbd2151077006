"""Loading a model and a text, and measuring how good the model is on the text."""
