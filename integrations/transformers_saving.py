"""Has ``save_pretrained`` of every transformers model write a manifest of what the model holds at that moment.

A model may have been made sparse as a part of another one, or have been put into another one, cut down or repeated
since: only when it is saved are its layers' names known.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from torch_prunepath.layer.saving import described


def install() -> None:
    """Wrap ``PreTrainedModel.save_pretrained``; dense models are saved as before."""
    save_pretrained = PreTrainedModel.save_pretrained

    @functools.wraps(save_pretrained)
    def save_described(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with described(self):
            return save_pretrained(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_described  # type: ignore[method-assign]
