"""Which neurons share an expert: a permutation of an FFN's neurons, from weights or from what neurons contribute.

A partition is ``order_F``, int64 ``[F]`` on the CPU: ``order_F[i]`` is the neuron that goes to place i, and expert e
holds places ``[e*S, (e+1)*S)``; the last expert is smaller where F is no multiple of S. Nothing is changed here: see
:meth:`torch_prunepath.layer.ffn.FFNView.permute_`.

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


def contiguous(ffn_size: int) -> Tensor:
    """Neurons as they come.

    Raises:
        ValueError: if ``ffn_size`` is below 1.
    """
    return torch.arange(_check_ffn_size(ffn_size))


def random(ffn_size: int, seed: int) -> Tensor:
    """A random permutation, the same for the same seed.

    Raises:
        ValueError: if ``ffn_size`` is below 1.
    """
    return torch.randperm(_check_ffn_size(ffn_size), generator=torch.Generator().manual_seed(seed))


def weight_features(view: FFNView) -> Tensor:
    """What PrunePath (arXiv 2605.28283) and MoEfication (arXiv 2110.01786) cluster: gate or else up rows.

    Returns:
        float32 ``[F, D]``, each row of norm 1; a row of zeros stays one.
    """
    rows_FD = view.up_FD if view.gate_FD is None else view.gate_FD
    return nnf.normalize(rows_FD.detach().float(), dim=1)


def contribution_features(contributions_TF: Tensor) -> Tensor:
    """A vector for every neuron, such that clusters of near vectors concentrate a token's contributions in few experts.

    Each token is divided by its mean, so that no token outweighs another. Neurons are *not* brought to a common norm:
    those that hardly ever contribute are near one another, and gather in experts that are hardly ever needed. Nor are
    shares compressed: with logarithms or roots fewer experts reach a given mass, but the model gets worse.

    Args:
        contributions_TF: ``[T, F]``, any floating dtype, nothing negative: ``|h_tf| * norm(down_f)``.

    Returns:
        float32 ``[F, T]``, on the device of the contributions. A token without any contribution gives zeros.

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

    A few thousand tokens suffice; time and memory grow with T as with D in :func:`balanced_kmeans`.

    Args:
        contributions_TF: ``[T, F]``, magnitudes of what neuron f adds to the FFN's output on token t.
        expert_size: S.
        iterations: see :func:`balanced_kmeans`.
        seed: see :func:`balanced_kmeans`.

    Raises:
        ValueError: see :func:`contribution_features` and :func:`balanced_kmeans`.
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
    """The permutation by one of four methods; neurons ascend within an expert, experts by their smallest neuron.

    Clusters on the CPU, wherever the model is: many small steps, for which a GPU was found slower.

    Args:
        name: ``"coactivation"`` (:func:`coactivation`), ``"kmeans"`` (:func:`balanced_kmeans` of
            :func:`weight_features`), ``"contiguous"`` or ``"random"``.
        view: the FFN.
        contributions_TF: ``[T, F]``; only ``"coactivation"`` looks at it, and needs it.
        expert_size: S.
        seed: seed of whatever is random.
        first_N: neurons that come first, as they are, and whole experts of them; the others are grouped. None: none.

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
    """The neurons that contribute most, averaged over tokens: int64 ``[count]`` on the CPU, ascending.

    They do for every token what a router need not choose: the shared experts of DeepSeekMoE (arXiv 2401.06066).
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
    """:func:`partition` of all neurons, or of ``some_F`` as if there were no others."""
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
            "pass calibration data, or choose partition='kmeans', which looks at weights alone"
        )
    if contributions_TF.dim() != 2 or contributions_TF.shape[1] != view.spec.ffn_size:
        shape = list(contributions_TF.shape)
        raise ValueError(f"contributions have shape {shape}, and the FFN {view.spec.ffn_size} neurons")
    contributions_TF = contributions_TF.cpu()
    if some_F is not None:
        contributions_TF = contributions_TF[:, some_F]
    return coactivation(contributions_TF, expert_size, seed=seed)


def _check_ffn_size(ffn_size: int) -> int:
    if ffn_size < 1:
        raise ValueError(f"ffn_size={ffn_size} must be at least 1")
    return ffn_size
