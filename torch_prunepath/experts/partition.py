"""Choosing which neurons share an expert: a permutation of an FFN's neurons, from weights or from contributions.

A partition is ``order_F``, int64 ``[F]`` on the CPU: ``order_F[i]`` is the neuron that goes to place i, and expert e
holds places ``[e*S, (e+1)*S)``; the last expert is smaller where F is no multiple of S. Nothing is changed here:
:meth:`torch_prunepath.layer.ffn.FFNView.permute_` does that.

Letters: T tokens, D hidden size, F neurons, S neurons an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.config import Partition, check_choice
from torch_prunepath.experts.kmeans import as_matrix, balanced_kmeans, tidy
from torch_prunepath.layer.ffn import FFNView

TOKEN_BLOCK = 256
"""Number of tokens that are scaled and transposed at a time. A guess."""


def contiguous(ffn_size: int) -> Tensor:
    """Return the partition that leaves the neurons in their order.

    Raises:
        ValueError: if ``ffn_size`` is below 1.
    """
    return torch.arange(_check_ffn_size(ffn_size))


def random(ffn_size: int, seed: int) -> Tensor:
    """Draw a random permutation, the same for the same seed.

    Raises:
        ValueError: if ``ffn_size`` is below 1.
    """
    return torch.randperm(_check_ffn_size(ffn_size), generator=torch.Generator().manual_seed(seed))


def weight_features(view: FFNView) -> Tensor:
    """Compute the features that PrunePath (arXiv 2605.28283) and MoEfication (arXiv 2110.01786) cluster.

    Returns:
        The gate rows, or the up rows in a plain FFN: float32 ``[F, D]``, each row scaled to norm 1; a row of zeros
        stays as it is.
    """
    rows_FD = view.up_FD if view.gate_FD is None else view.gate_FD
    return nnf.normalize(rows_FD.detach().float(), dim=1)


def contribution_features(contributions_TF: Tensor) -> Tensor:
    """Compute a vector for every neuron; clusters of near vectors put a token's contributions into few experts.

    The contributions of each token are divided by their mean, so that all tokens count alike. The vectors of neurons
    are *not* scaled to a common norm: neurons that hardly ever contribute are then near one another, and gather in
    experts that are hardly ever needed. Contributions are not compressed either: with logarithms or roots fewer experts
    reach a given mass, but the model gets worse (docs/log.md, "choosing the training-free defaults on SmolLM2-135M").

    Args:
        contributions_TF: ``|h_tf| * norm(down_f)``, ``[T, F]``, any floating dtype, nothing negative.

    Returns:
        The vectors, float32 ``[F, T]``, on the device of the contributions. A token without any contribution gives
        zeros.

    Raises:
        ValueError: if the contributions are not a matrix of finite floating-point numbers of at least 0.
    """
    contributions_TF = as_matrix("contributions", contributions_TF)
    if float(contributions_TF.min()) < 0:
        raise ValueError("contributions must not be negative: pass magnitudes, |h| * norm(down)")
    features_FT = torch.empty_like(contributions_TF.T, memory_format=torch.contiguous_format)
    blocks = zip(contributions_TF.split(TOKEN_BLOCK), features_FT.split(TOKEN_BLOCK, dim=1), strict=True)
    for block_TF, result_FT in blocks:
        # By the largest first, or the mean of huge or tiny numbers could leave float32.
        relative_TF = block_TF / block_TF.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        relative_TF /= relative_TF.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        result_FT.copy_(relative_TF.T)
    return features_FT


def coactivation(contributions_TF: Tensor, expert_size: int, *, iterations: int = 20, seed: int = 0) -> Tensor:
    """Group neurons that contribute on the same tokens: :func:`balanced_kmeans` of :func:`contribution_features`.

    A few thousand tokens suffice. Time and memory grow with T, which is D in :func:`balanced_kmeans`.

    Args:
        contributions_TF: norm of the vector that neuron f adds to the FFN's output on token t, ``[T, F]``.
        expert_size: neurons of an expert, S.
        iterations: largest number of rounds, as in :func:`balanced_kmeans`.
        seed: seed, as in :func:`balanced_kmeans`.

    Returns:
        The partition, int64 ``[F]`` on the CPU.

    Raises:
        ValueError: if :func:`contribution_features` or :func:`balanced_kmeans` refuses an argument.
    """
    return balanced_kmeans(contribution_features(contributions_TF), expert_size, iterations=iterations, seed=seed)


def partition(
    name: Partition,
    view: FFNView,
    contributions_TF: Tensor | None,
    expert_size: int,
    seed: int = 0,
    *,
    first_N: Tensor | None = None,
) -> Tensor:
    """Compute a partition by one of four methods.

    Neurons ascend within an expert, and experts by their smallest neuron. Clustering runs on the CPU wherever the model
    is: it has many small steps, for which a GPU was slower (docs/log.md, "choosing the training-free defaults on
    SmolLM2-135M").

    Args:
        name: ``"coactivation"`` (:func:`coactivation`), ``"kmeans"`` (:func:`balanced_kmeans` of
            :func:`weight_features`), ``"contiguous"`` or ``"random"``.
        view: the FFN.
        contributions_TF: contributions ``[T, F]``, which only ``"coactivation"`` needs.
        expert_size: neurons of an expert, S.
        seed: seed of the random choices.
        first_N: neurons that come first, in the given order, as many as whole experts have; the others are grouped.
            None: all are grouped.

    Raises:
        ValueError: if the name is not known, the contributions are missing or do not fit the FFN, or an argument is out
            of range.
    """
    check_choice("partition", name, Partition)
    if expert_size < 1:
        raise ValueError(f"expert_size={expert_size} must be at least 1")
    if first_N is not None:
        others_F = torch.ones(view.spec.ffn_size, dtype=torch.bool).index_fill_(0, first_N, False).nonzero().squeeze(1)
        order = _group(name, view, contributions_TF, expert_size, seed, others_F)
        return torch.cat([first_N, others_F[order]])
    return _group(name, view, contributions_TF, expert_size, seed, None)


def largest_contributions(contributions_TF: Tensor, count: int) -> Tensor:
    """Find the neurons that contribute most, averaged over tokens: int64 ``[count]`` on the CPU, ascending.

    They form the shared experts, which are active for every token as in DeepSeekMoE (arXiv 2401.06066).
    """
    mean_F = contributions_TF.float().mean(0).cpu()
    return mean_F.sort(descending=True, stable=True).indices[:count].sort().values


def _group(
    name: Partition,
    view: FFNView,
    contributions_TF: Tensor | None,
    expert_size: int,
    seed: int,
    some_F: Tensor | None,
) -> Tensor:
    """Compute the :func:`partition` of all neurons, or that of ``some_F`` as if there were no others."""
    ffn_size = view.spec.ffn_size if some_F is None else len(some_F)
    if name == "contiguous":
        return contiguous(ffn_size)
    if name == "random":
        return tidy(random(ffn_size, seed), expert_size)
    if name == "kmeans":
        features_FD = weight_features(view).cpu()
        return balanced_kmeans(features_FD if some_F is None else features_FD[some_F], expert_size, seed=seed)
    if contributions_TF is None:
        raise ValueError(
            "partition='coactivation' groups neurons by what they contribute on calibration data, and there is none: "
            "pass calibration data, or choose partition='kmeans', which needs none"
        )
    if contributions_TF.dim() != 2 or contributions_TF.shape[1] != view.spec.ffn_size:
        shape = list(contributions_TF.shape)
        raise ValueError(
            f"contributions have shape {shape}, and the FFN {view.spec.ffn_size} neurons: pass a matrix with a column "
            "for each neuron"
        )
    contributions_TF = contributions_TF.cpu()
    if some_F is not None:
        contributions_TF = contributions_TF[:, some_F]
    return coactivation(contributions_TF, expert_size, seed=seed)


def _check_ffn_size(ffn_size: int) -> int:
    if ffn_size < 1:
        raise ValueError(f"ffn_size={ffn_size} must be at least 1")
    return ffn_size
