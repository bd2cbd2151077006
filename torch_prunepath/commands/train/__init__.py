"""``prunepath train``: a sparse model trained on text, or a dense one made sparse first."""
