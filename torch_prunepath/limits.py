"""What the Triton kernels take, for those that choose what to hand them: compiler passes do not import Triton."""

from __future__ import annotations

LINEARS_AT_ONCE = 3
"""Dense linear layers of one token that one launch takes: queries, keys and values."""
