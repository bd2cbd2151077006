"""PrunePath (arXiv 2605.28283) exactly as its authors' released code trains it, from this library's own parts."""

from __future__ import annotations

from torch_prunepath.config import SparsifyConfig
from torch_prunepath.train import recipes
from torch_prunepath.train.config import TrainConfig


def released_prunepath(epochs: float = 1.0, tau: float = 0.95) -> tuple[SparsifyConfig, TrainConfig]:
    """How PrunePath's released code converts and trains.

    Experts of 32 neurons by balanced k-means of L2-normalised gate rows; linear routers without bias, all zero; outputs
    weighed by the sigmoid of the scores; an expert is active while the probability through it stays below tau. Trained
    with every expert for ``epochs``, then at ``tau`` (released: 0.95 or 0.5) for as many, on the task, the entropy of
    the routers (3e-4) and their load balance (1e-3). The model is one of ours: checkpoints hold it.

    Example::

        config, stages = released_prunepath()
        sparsify(model, tau=1.0, config=config)
        train(model, batches, stages)
    """
    return recipes.EXPERTS["paper"], recipes.paper(epochs, tau)
