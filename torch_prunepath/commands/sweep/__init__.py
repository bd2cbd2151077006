"""``prunepath sweep``: lm-eval tasks over a list of tau or of sparsities, from one loaded model, and their curve."""
