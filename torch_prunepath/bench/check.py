"""Checks of outputs against float64 before anything is timed: no time is reported for a wrong result.

Shapes: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.bench.layers import TimedFFN
from torch_prunepath.console.errors import UserError
from torch_prunepath.layer.reference import router_scores_reference
from torch_prunepath.ops.experts import expand_experts

MASS_TOLERANCE = 1e-5
"""Largest distance from tau of the mass that decides about an expert at which the expert may be active or not. float32
sums of the mass are off by less; a guess."""

CHECKED_TOKENS = 8
"""Largest number of tokens of a batch that are compared. float64 is slow, and a kernel that is wrong is wrong for many
tokens; 8 is a guess."""

BOUNDS: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
)
"""Largest relative RMS error of a token's output, by dtype. In float16 and bfloat16 it is about four roundings (half an
epsilon each). There is no record of how the bounds were chosen."""


class WrongResult(UserError):
    """Error for a call that was to be timed but computes something other than the reference."""

    exit_code = 1


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Largest ``rms(found - expected) / rms(expected)`` over the rows of ``[T, D]``; NaN if any number is NaN."""
    found, expected = found.double(), expected.double()
    scale_T = expected.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((found - expected).square().mean(-1).sqrt() / scale_T).max())


def require(error: float, bound: float, what: str) -> float:
    """Return the error if it is within the bound.

    Args:
        error: a relative RMS error.
        bound: the largest error allowed.
        what: name of the compared thing, for the message.

    Raises:
        WrongResult: if the error is above the bound or NaN.
    """
    if not error <= bound:
        raise WrongResult(
            f"{what} is wrong, so no time is reported: relative RMS error {error:.3g}, at most {bound:.3g} allowed"
        )
    return error


@torch.no_grad()
def check_layer(layer: TimedFFN, x_TD: Tensor, dense_TD: Tensor, sparse_TD: Tensor, what: str) -> float:
    """Compare a layer's outputs with float64 on ``CHECKED_TOKENS`` tokens spread over the batch.

    Args:
        layer: the FFN, with its tau set.
        x_TD: the layer's input.
        dense_TD: output of the dense computation.
        sparse_TD: output of the sparse computation.
        what: name of both outputs, for the message.

    Returns:
        The larger relative RMS error of the two outputs.

    Raises:
        WrongResult: if an error is above ``BOUNDS``, an output has another shape than the input, or any number in it is
            NaN or infinite.
    """
    for name, y_TD in (("dense", dense_TD), ("sparse", sparse_TD)):
        if y_TD.shape != x_TD.shape or not bool(torch.isfinite(y_TD).all()):
            raise WrongResult(f"{name} {what} is wrong, so no time is reported: NaN, infinity or a wrong shape")
    rows = torch.linspace(0, len(x_TD) - 1, min(CHECKED_TOKENS, len(x_TD)), device=x_TD.device).round().long()
    reference = _Reference(layer, x_TD[rows])
    bound = BOUNDS[x_TD.dtype]
    dense = require(relative_rms(dense_TD[rows], reference.dense()), bound, f"dense {what}")
    found_TD = sparse_TD[rows].double()
    return max(dense, require(relative_rms(found_TD, reference.sparse(found_TD)), bound, f"sparse {what}"))


class _Reference:
    """The computation of one layer in float64."""

    def __init__(self, layer: TimedFFN, x_TD: Tensor) -> None:
        x_TD = x_TD.double()

        def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
            y = x_TD @ weight.double().t()
            return y if bias is None else y + bias.double()

        act = ACTIVATIONS[layer.activation]
        up_TF = linear(layer.up_FD, layer.up_bias_F)
        self.h_TF = act(up_TF) if layer.gate_FD is None else act(linear(layer.gate_FD, layer.gate_bias_F)) * up_TF
        self.layer = layer
        self.scores_TE = router_scores_reference(x_TD, layer.router_ED, layer.router_bias_E, layer.router_norm)
        self.down_FD = layer.down_FD.double()
        self.bias_D = 0.0 if layer.down_bias_D is None else layer.down_bias_D.double()

    def dense(self) -> Tensor:
        return self.h_TF @ self.down_FD + self.bias_D

    def sparse(self, found_TD: Tensor) -> Tensor:
        """Return the output; experts whose mass is at tau are active in it where ``found_TD`` shows that they were."""
        size, ffn_size = self.layer.expert_size, self.h_TF.shape[1]
        offset = self.layer.gate_offset
        weights_TE = None if offset is None else torch.sigmoid(self.scores_TE + offset)
        if weights_TE is not None:
            weights_TE[:, : self.layer.shared] = 1.0
        h_TF = self.h_TF if weights_TE is None else self.h_TF * expand_experts(weights_TE, size, ffn_size)
        mask_TE, open_TE = self._masks()
        y_TD = h_TF.masked_fill(~expand_experts(mask_TE, size, ffn_size), 0) @ self.down_FD + self.bias_D
        for t in open_TE.any(-1).nonzero().flatten().tolist():
            parts_AD = self._contributions(h_TF[t], open_TE[t].nonzero().flatten())
            # The coefficients that explain the difference best, as near to 0 or 1 as can be told.
            gram_AA = parts_AD @ parts_AD.t()
            gram_AA.diagonal().add_(1e-9 * gram_AA.diagonal().mean() + torch.finfo(torch.float32).tiny)
            share_A = torch.linalg.solve(gram_AA, parts_AD @ (found_TD[t] - y_TD[t]))
            y_TD[t] += share_A.round().clamp(0, 1) @ parts_AD
        return y_TD

    def _masks(self) -> tuple[Tensor, Tensor]:
        """Return the experts that must be active and those that may be active or not, each bool ``[T, E]``."""
        tau = float(self.layer.tau)
        shared = self.layer.shared
        p_TE = torch.softmax(self.scores_TE[:, shared:], -1)
        ranked_TE, order_TE = torch.sort(p_TE, dim=-1, descending=True, stable=True)
        mass_TE = ranked_TE.cumsum(-1)
        if self.layer.rule == "reach":
            mass_TE = mass_TE - ranked_TE
        top_TE = torch.zeros_like(mass_TE, dtype=torch.bool)
        top_TE[:, 0] = True
        near_TE = ((mass_TE - tau).abs() <= MASS_TOLERANCE) & ~top_TE & (tau < 1)
        sure_TE = ((mass_TE < tau) | top_TE | torch.tensor(tau >= 1, device=mass_TE.device)) & ~near_TE
        blank_TE = torch.zeros_like(top_TE)
        sure_TE, near_TE = blank_TE.scatter(-1, order_TE, sure_TE), blank_TE.scatter(-1, order_TE, near_TE)
        return nnf.pad(sure_TE, (shared, 0), value=True), nnf.pad(near_TE, (shared, 0), value=False)

    def _contributions(self, h_F: Tensor, experts_A: Tensor) -> Tensor:
        size = self.layer.expert_size
        rows = [slice(e * size, (e + 1) * size) for e in experts_A.tolist()]
        return torch.stack([h_F[row] @ self.down_FD[row] for row in rows])
