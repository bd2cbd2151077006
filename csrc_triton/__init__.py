"""Triton kernels; installed as ``torch_prunepath.csrc_triton``. Importing this package does not import Triton."""

from __future__ import annotations

UNION_TOKENS = 16
"""Most tokens for which kernels read the union of their experts; more compute all neurons and zero inactive ones. At 32
tokens the union was slower (docs/log.md, "kernels for one FFN on an H100"); nothing between 16 and 32 was tried."""

LINEARS_AT_ONCE = 3
"""How many dense linear layers of one token share a launch: queries, keys and values, which read the same token."""
