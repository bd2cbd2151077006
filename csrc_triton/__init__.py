"""Triton kernels; installed as ``torch_prunepath.csrc_triton``. Importing this package does not import Triton."""
