"""How each method makes a model sparse and trains it, all with the same steps, data and learning rates.

========================= ============================================================================================
``dense``                 the dense model, fine-tuned
``dense-longer``          on ``tuned`` tasks: the same, trained on for as long as the other methods are
``ours``                  one checkpoint for a range of sparsities (``recipes.ours``)
``held``                  a run for each sparsity (``recipes.held``)
``routers``, ``lora``     routers alone, or with LoRA; the model's own weights stay (causal models)
``static-SCORE``          neurons removed by ``norm``, ``rms`` or ``wanda``, and the rest trained
``moefication-ROUTER``    MoEfication with routers ``mlp`` or ``centroid``
``lte``, ``lte-held``     LTE as published, or its threshold moved to hold one sparsity
``d2dmoe-max``, ``d2dmoe-cumulative``   D2DMoE as published
``d2dmoe-held``           D2DMoE, the rest of the steps training what was converted for one sparsity
``prunepath``             PrunePath as its authors' code trains it
``cats``, ``teal``        thresholds on activations of the dense model
========================= ============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.task import Trained


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        title: in tables.
        train: converts and trains.
        own: names of its settings besides those of ``TrainConfig``.
        each: whether each sparsity needs a run of its own.
        dense: whether it has no sparsity at all.
        tuned: whether only ``tuned`` tasks have it.
        causal: whether only causal language models have it.
    """

    title: str
    train: Callable[[Any], Trained]
    own: frozenset[str] = frozenset()
    each: bool = False
    dense: bool = False
    tuned: bool = False
    causal: bool = False


METHODS: Mapping[str, Method] = {}
"""Every method by name."""
