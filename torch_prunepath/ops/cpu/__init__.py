"""The operators on CPUs; files are called as those of ``csrc_triton``."""
