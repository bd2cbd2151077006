"""Triton kernels; installed as ``torch_prunepath.csrc_triton``. Importing this package does not import Triton."""

from __future__ import annotations

UNION_TOKENS = 16
"""Up to so many tokens kernels read the union of their experts; more compute every neuron and zero inactive ones."""
LINEARS_AT_ONCE = 3
"""Dense linear layers of one token that one launch takes: queries, keys and values."""
