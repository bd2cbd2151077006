"""``prunepath bench``: how fast sparse FFNs and whole sparse models are, next to dense ones and to the memory floor."""
