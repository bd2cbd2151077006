"""Scores and tau -> which experts are active; magnitudes and a threshold -> which entries count inside them.

The one definition that every other implementation is tested against. Inside an active expert, two thresholds apply, 0
by default:

- *inputs*: for gate and up (or fc1), channel d of a token counts iff ``|x_d| * c_d >= theta_x``, where ``c_d`` is the
  norm of column d of [gate; up] over the whole layer (WINA's weight, arXiv 2505.19427). The router reads all of x.
- *neurons*: for down (or fc2), neuron f counts iff ``|h_f| * ||down_f|| >= theta_h``, where ``h_f`` is its hidden
  activation, computed from the inputs that count, before its expert's weight multiplies it.

What does not count is taken for 0; biases always count. Each token has its own sets, whatever else is in the batch.

Shapes: T tokens, E experts, N entries of a token's vector (channels or neurons).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.config import Rule, check_choice, check_tau
from torch_prunepath.weights import Threshold


def select_experts(scores_TE: Tensor, tau: float | Tensor, rule: Rule = "reach", shared: int = 0) -> Tensor:
    """Choose the active experts of every token (PrunePath, arXiv 2605.28283).

    Experts are ranked by ``p = softmax(scores)`` in float32, ties by lower index, and ``mass_before(e)`` is the sum of
    p over the experts ranked ahead of e. With rule ``"reach"`` expert e is active iff ``mass_before(e) < tau``: the
    smallest top-ranked set whose mass reaches tau. With rule ``"below"`` (the PrunePath authors' released code) it is
    active iff the mass through e is under tau, and the top expert always is. Under both rules ``tau >= 1`` activates
    every expert.

    Args:
        scores_TE: router scores ``[T, E]`` (or any leading dimensions), bf16, fp16, fp32 or fp64; compared in float32.
        tau: mass to reach, in (0, 1]; a float or a 0-d tensor.
        rule: ``"reach"`` or ``"below"``.
        shared: the first so many experts are active whatever their scores; all of the above is about the others.

    Returns:
        bool ``[T, E]``.

    Raises:
        ValueError: if a score is NaN or infinite, tau is outside (0, 1], the rule is unknown or there is no expert to
            choose.

    Example:
        >>> import torch
        >>> select_experts(torch.tensor([[0.5, 0.3, 0.2]]).log(), tau=0.6)
        tensor([[ True,  True, False]])
    """
    check_choice("rule", rule, Rule)
    tau = check_tau(float(tau))
    if not scores_TE.is_floating_point() or scores_TE.dim() < 1 or scores_TE.shape[-1] == 0:
        raise ValueError(f"scores must be floating point [..., E] with E >= 1, not {scores_TE.dtype} {scores_TE.shape}")
    if not 0 <= shared < scores_TE.shape[-1]:
        raise ValueError(f"shared={shared} must be at least 0, and fewer than the {scores_TE.shape[-1]} experts")
    if not bool(torch.isfinite(scores_TE[..., shared:]).all()):
        raise ValueError("scores hold NaN or infinity: check the router's weights and its input")
    return mask_from_scores(scores_TE, torch.tensor(tau, device=scores_TE.device), rule, shared)


def mask_from_scores(scores_TE: Tensor, tau: Tensor, rule: Rule, shared: int = 0) -> Tensor:
    """:func:`select_experts` without checks and without a device synchronisation; ``tau`` is a 0-d float32 tensor.

    A token whose scores are NaN gets every expert, so that the NaN shows in the output as it would in the dense model.
    """
    if shared:
        return with_shared(mask_from_scores(scores_TE[..., shared:], tau, rule), shared)
    p_TE = torch.softmax(scores_TE.to(torch.float32), dim=-1)
    ranked_TE, order_TE = torch.sort(p_TE, dim=-1, descending=True, stable=True)
    through_TE = torch.cumsum(ranked_TE, dim=-1)
    if rule == "reach":
        mass_TE = torch.cat([torch.zeros_like(through_TE[..., :1]), through_TE[..., :-1]], dim=-1)
    else:
        mass_TE = torch.cat([torch.zeros_like(through_TE[..., :1]), through_TE[..., 1:]], dim=-1)
    # Negated, so that NaN counts as active.
    inactive_TE = (mass_TE >= tau) & (tau < 1.0)
    return torch.zeros_like(inactive_TE).scatter(-1, order_TE, ~inactive_TE)


def with_shared(mask_TE: Tensor, shared: int) -> Tensor:
    """The mask of all experts from that of the routed ones, shared ones active: ``[..., E - shared] -> [..., E]``."""
    always = mask_TE.new_ones(*mask_TE.shape[:-1], shared)
    return torch.cat([always, mask_TE], dim=-1)


def sigmoid_weights(scores_TE: Tensor, offset: float, shared: int = 0) -> Tensor:
    """The weights of the experts' outputs, ``sigmoid(scores + offset)``, and 1 for the first ``shared``: ``[T, E]``."""
    if not shared:
        return torch.sigmoid(scores_TE + offset)
    return nnf.pad(torch.sigmoid(scores_TE[:, shared:] + offset), (shared, 0), value=1.0)


def uncounted(values_TN: Tensor, threshold: Threshold) -> Tensor:
    """Which entries do not count, bool ``[..., N]``: those with ``|value| * norm < theta``, in float32.

    So NaN counts, and shows in the output as it would in the dense model; and theta = 0 lets everything count.
    """
    return values_TN.detach().abs().float() * threshold.norm_N < threshold.theta


def keep_counted(values_TN: Tensor, threshold: Threshold | None) -> Tensor:
    """The values with 0 in the place of those that do not count, ``[..., N]``; all of them without a threshold.

    The choice has no gradient; what counts passes its gradient on, what does not gets none.
    """
    return values_TN if threshold is None else values_TN.masked_fill(uncounted(values_TN, threshold), 0)
