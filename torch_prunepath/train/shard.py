"""Training over several devices, each of which holds a part of every weight: FSDP2 (``fully_shard``)."""

from __future__ import annotations

from torch import nn

from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.train.config import TrainConfig


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has sharded any parameter of the module or of its submodules."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def check_sharded(model: nn.Module, config: TrainConfig) -> None:
    """Refuse losses for which FSDP2 would compute no gradient, without an error.

    FSDP2 distributes gradients when the backward pass comes through the outputs of the modules that it shards.

    Raises:
        ValueError: if the model is sharded and no loss has a gradient through the model's output.
    """
    if not is_sharded(model):
        return
    gates = {layer.experts.gate for layer in sparse_layers(model).values()}
    if not config.losses.keys() & {"task", "distill_logits"} or (config.train == "routers" and gates == {"one"}):
        raise ValueError(
            "the model is sharded (FSDP2), and no loss has a gradient through the model's output; without one, FSDP2 "
            "gives routers no gradient: use DistributedDataParallel, or give task or distill_logits a weight with "
            "train='all'"
        )
