"""What carries a routing between two places of one forward pass that only share an object.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from torch import Tensor


class Chosen(NamedTuple):
    """What the first half of an FFN tells the second.

    Attributes:
        mask_TE: the active experts, bool ``[T, E]``.
        weights_TE: the weights of their outputs, float32 ``[T, E]``; None where all are 1.
        theta_h: the threshold on neurons, 0-d float32; None where none was ever set.
    """

    mask_TE: Tensor
    weights_TE: Tensor | None
    theta_h: Tensor | None = None


class Handoff(threading.local):
    """One slot for the routing of the call that is under way: each thread has a slot of its own.

    Servers run one model in several threads, each in a call of its own. A call stays in its thread, also when gradient
    checkpointing computes a block again, so that the slot of a thread is that of a call.

    Attributes:
        routing: what was chosen; None between calls.
    """

    def __init__(self) -> None:
        self.routing: Chosen | None = None

    def take(self) -> Chosen | None:
        """Empty the slot, and return what was in it."""
        routing, self.routing = self.routing, None
        return routing

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # What is under way belongs to this process: copies and pickles are empty.
        return Handoff, ()
