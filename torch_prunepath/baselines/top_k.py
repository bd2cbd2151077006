"""MoEfication (Zhang et al., arXiv 2110.01786): a fixed number of experts for every token.

Experts are balanced k-means clusters of the neurons' L2-normalised gate rows, or up rows where there is no gate. A
router ranks them: by the distance between the token, scaled to norm 1, and each expert's mean row, or by a small
network that predicts how much each expert will activate. Both follow the released code, which was written for ReLU
networks. In a gated FFN, the positive part of the gate's activation counts as activation.

Shapes: N calibration tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.baselines.routed import CALIBRATION_TOKENS, RoutedBaseline, calibration_inputs, convert
from torch_prunepath.baselines.routers import MLPRouter, UnitRouter, fit
from torch_prunepath.baselines.rules import top_share
from torch_prunepath.config import check_choice, check_sparsity
from torch_prunepath.discover import Which
from torch_prunepath.experts.fit import centroid_init
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.router import Router
from torch_prunepath.ops.experts import expert_sums
from torch_prunepath.sparsity import set_tau

MoEficationRouter = Literal["mlp", "centroid"]

PUBLISHED_SHARE = 0.2
"""Share of the experts that the paper's main results activate."""


class MoEfication(RoutedBaseline):
    """MoEfication on a model: ``k = round(tau * E)`` experts are active for every token, so tau is their share."""

    def set_sparsity(
        self, share: float, batches: Any = None, *, tokenizer: Any = None, progress: bool = False
    ) -> float:
        """Make this share of the experts inactive, and return tau. Data is not needed, and ignored if given.

        The realised share of neurons differs a little where E times the share is not whole, or where the last expert is
        smaller.

        Raises:
            ValueError: if share is outside [0, 1).
        """
        check_sparsity(share, "target sparsity")
        set_tau(self.model, 1.0 - share)
        return 1.0 - share


def moefication(
    model: nn.Module,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    router: MoEficationRouter = "mlp",
    expert_size: int = 32,
    tau: float = PUBLISHED_SHARE,
    tokens: int = CALIBRATION_TOKENS,
    epochs: int = 30,
    seed: int = 0,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> MoEfication:
    """Apply MoEfication to a dense model, in place.

    The result works without training, and :func:`torch_prunepath.train.train` can train it. Routers are frozen: the
    paper trains the model around them. Checkpoints do not hold the method.

    Args:
        model: a dense model.
        calibration: data to which ``router="mlp"`` is fitted, as for :func:`torch_prunepath.sparsify`; with None a
            causal language model samples its own text. ``router="centroid"`` needs no data.
        tokenizer: tokenizer for texts.
        router: ``"mlp"``: ``D -> E -> E`` with tanh and no biases, which starts at the centroids and the identity. It
            is fitted by binary cross-entropy (Adam, 0.01) to each expert's summed positive activations, divided by the
            batch's largest. ``"centroid"``: the distance from each expert's mean row.
        expert_size: neurons of an expert, S.
        tau: share of the experts that are active.
        tokens: largest number of calibration tokens that are used.
        epochs: passes over the calibration tokens.
        seed: seed of clustering, sampled text and fitting.
        include: the FFNs to take; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these to leave out.
        progress: show progress bars.

    Raises:
        ValueError: if nothing can be converted or the data does not fit. The model is as it was.
    """
    check_choice("router", router, MoEficationRouter)
    if router == "centroid" and calibration is not None:
        raise ValueError("router='centroid' uses no calibration data: leave calibration out, or choose router='mlp'")
    inputs = None
    if router == "mlp":
        inputs = calibration_inputs(model, calibration, tokenizer, tokens, seed, progress)
    build = partial(_build, router=router, expert_size=expert_size, epochs=epochs, seed=seed)
    convert(
        model,
        expert_size,
        build,
        top_share,
        inputs,
        tau=tau,
        seed=seed,
        include=include,
        exclude=exclude,
        progress=progress,
    )
    return MoEfication(model, inputs)


def _build(
    view: FFNView, x_ND: Tensor | None, *, router: MoEficationRouter, expert_size: int, epochs: int, seed: int
) -> Router:
    centres_ED = centroid_init(view, torch.arange(view.spec.ffn_size), expert_size)
    if router == "centroid":
        # Ranks as the distance does from a token x of norm 1: |x - c|^2 = 1 - 2 (x c - |c|^2 / 2).
        return UnitRouter.of(centres_ED, -0.5 * centres_ED.square().sum(-1))
    assert x_ND is not None
    identity_EE = torch.eye(len(centres_ED), device=centres_ED.device)
    mlp = MLPRouter.stack(Router.of(centres_ED, None), Router.of(identity_EE, None), "tanh", unit_input=True)
    labels_NE = activation_sums(view, x_ND, expert_size)
    return fit(mlp, x_ND, labels_NE, _cross_entropy, lr=0.01, epochs=epochs, seed=seed, quality=_captured)


def gate_activations(view: FFNView, x_ND: Tensor) -> Tensor:
    """Compute ``act(gate(x))``, or ``act(up(x))`` of a plain FFN: ``[N, D] -> [N, F]`` in the dtype of ``x_ND``."""
    gated = view.gate_FD is not None
    rows_FD = view.gate_FD if view.gate_FD is not None else view.up_FD
    bias_F = view.gate_bias_F if gated else view.up_bias_F
    pre_NF = nnf.linear(x_ND, rows_FD.to(x_ND.dtype), None if bias_F is None else bias_F.to(x_ND.dtype))
    return ACTIVATIONS[view.spec.activation](pre_NF)


def activation_sums(view: FFNView, x_ND: Tensor, expert_size: int) -> Tensor:
    """Sum each expert's positive activations on tokens scaled to norm 1: float32 ``[N, E]``.

    The sums are scaled, not the tokens. For a ReLU without bias that is the same, and any other activation function
    still gets the inputs that it was made for.
    """
    norm_N1 = x_ND.float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    parts = x_ND.split(4096), norm_N1.split(4096)  # bounds what is as wide as the FFN
    return torch.cat(
        [
            expert_sums(gate_activations(view, x).float().clamp_min(0), expert_size) / norm
            for x, norm in zip(*parts, strict=True)
        ]
    )


def _cross_entropy(scores_BE: Tensor, sums_BE: Tensor) -> Tensor:
    labels_BE = sums_BE / sums_BE.max().clamp_min(torch.finfo(sums_BE.dtype).tiny)
    return nnf.binary_cross_entropy_with_logits(scores_BE, labels_BE)


def _captured(scores_BE: Tensor, sums_BE: Tensor) -> Tensor:
    """Compute the share of all activation that is in the best-ranked fifth of the experts, over tokens with any."""
    k = max(1, int(PUBLISHED_SHARE * scores_BE.shape[-1]))
    captured_B = sums_BE.gather(-1, scores_BE.topk(k, dim=-1).indices).sum(-1)
    total_B = sums_BE.sum(-1)
    return (captured_B / total_B)[total_B > 0].mean().nan_to_num(0.0)
