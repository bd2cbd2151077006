"""Other methods with which ours is compared, on the same training loop, data and count of sparsity.

Routed methods (``moefication``, ``lte``, ``d2dmoe``) give a model sparse layers whose tau, records and training are
ours. ``prune`` and ``train_dense`` are static methods. ``cats`` and ``teal`` need no training and set single
activations to 0. All are for comparison only: what they add to a model is not saved in checkpoints, and
``save_pretrained`` of a routed one refuses. PrunePath as its authors' released code trains it is no baseline but a
recipe: ``recipes.EXPERTS["paper"]`` and ``recipes.paper()``.
"""

from __future__ import annotations

from torch_prunepath.baselines.dense import train_dense
from torch_prunepath.baselines.dynamic_k import d2dmoe
from torch_prunepath.baselines.hoyer import enforce_sparsity, square_hoyer
from torch_prunepath.baselines.pruning import Pruned, prune
from torch_prunepath.baselines.routed import RoutedBaseline
from torch_prunepath.baselines.sigmoid import LTE, lte
from torch_prunepath.baselines.thresholds import Thresholding, ThresholdRecord, cats, teal
from torch_prunepath.baselines.top_k import MoEfication, moefication

__all__ = [
    "LTE",
    "MoEfication",
    "Pruned",
    "RoutedBaseline",
    "ThresholdRecord",
    "Thresholding",
    "cats",
    "d2dmoe",
    "enforce_sparsity",
    "lte",
    "moefication",
    "prune",
    "square_hoyer",
    "teal",
    "train_dense",
]
