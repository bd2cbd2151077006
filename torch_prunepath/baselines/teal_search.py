"""TEAL's allocation (arXiv 2408.14690): the share of each matrix's input to leave out, within one FFN.

Shapes: N calibration tokens, D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.quantiles import Quantiles

STEP = 0.05
"""Share by which one matrix becomes sparser in a step, if all matrices have one size. Chosen without measurement."""
TOKENS = 256
"""Largest number of tokens on which the search measures errors. Chosen without measurement."""


@dataclass(frozen=True)
class Path:
    """Shares of each matrix's input that are left out, on the way from none to all.

    Attributes:
        totals: share of the whole FFN at each point, ascending from 0 to 1.
        shares: share of each matrix at the same points.
    """

    totals: list[float]
    shares: dict[str, list[float]]

    def share_of(self, matrix: str, total: float) -> float:
        """Return a matrix's share where the FFN's is ``total``, by linear interpolation between the points."""
        i = next(i for i, at in enumerate(self.totals) if at >= total)
        if i == 0:
            return self.shares[matrix][0]
        low, high = self.totals[i - 1], self.totals[i]
        before, after = self.shares[matrix][i - 1 : i + 1]
        return before + (after - before) * (total - low) / (high - low)


def matrices(view: FFNView) -> dict[str, nn.Module]:
    """Return the modules of the FFN's matrices by role; if gate and up are fused, they are ``up``."""
    named = {"gate": view.gate, "up": view.up, "down": view.down}
    return {name: module for name, module in named.items() if module is not None}


def uniform_path(view: FFNView, x_ND: Tensor, found: Mapping[str, Quantiles], sizes: Mapping[str, int]) -> Path:
    """Return the path on which every matrix has the same share."""
    return Path([0.0, 1.0], {name: [0.0, 1.0] for name in found})


@torch.no_grad()
def greedy_path(view: FFNView, x_ND: Tensor, found: Mapping[str, Quantiles], sizes: Mapping[str, int]) -> Path:
    """Search a path in steps. Each leaves out more of one matrix's input, where the FFN's output changes least.

    A step leaves out the same number of weights in any matrix. The error is the mean over tokens of the L2 norm of the
    change of the output.

    Args:
        view: a dense FFN.
        x_ND: inputs of the FFN.
        found: distribution of each matrix's inputs.
        sizes: number of weights of each matrix.
    """
    x_ND = x_ND[:: -(-len(x_ND) // TOKENS)]
    whole = sum(sizes.values())
    steps = {name: STEP * whole / len(sizes) / size for name, size in sizes.items()}
    shares = dict.fromkeys(found, 0.0)
    path = Path([0.0], {name: [0.0] for name in found})
    target_ND = _output(view, x_ND, {})
    while any(share < 1.0 for share in shares.values()):
        tried = {}
        for name in (name for name, share in shares.items() if share < 1.0):
            more = {**shares, name: _step(shares[name], steps[name])}
            limits = {key: found[key].threshold(share) for key, share in more.items()}
            tried[name] = float((_output(view, x_ND, limits) - target_ND).float().norm(dim=-1).mean())
        best = min(tried, key=tried.__getitem__)
        shares[best] = _step(shares[best], steps[best])
        path.totals.append(sum(sizes[name] * share for name, share in shares.items()) / whole)
        for name, share in shares.items():
            path.shares[name].append(share)
    return path


def _step(share: float, step: float) -> float:
    """Increase the share by a step; if less than half a step would then be left, go to 1."""
    return 1.0 if share + 1.5 * step > 1.0 else share + step


def _output(view: FFNView, x_ND: Tensor, limits: Mapping[str, float]) -> Tensor:
    """Compute the FFN without the bias of its down-projection, leaving out matrix inputs at or under their limits."""

    def project(matrix: str, rows_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        bias_F = None if bias_F is None else bias_F.to(x_ND.dtype)
        return nnf.linear(_keep(x_ND, limits.get(matrix)), rows_FD.to(x_ND.dtype), bias_F)

    act = ACTIVATIONS[view.spec.activation]
    h_NF = project("up", view.up_FD, view.up_bias_F)
    if view.gate_FD is None:
        h_NF = act(h_NF)
    else:
        h_NF = act(project("up" if view.gate is None else "gate", view.gate_FD, view.gate_bias_F)) * h_NF
    return _keep(h_NF, limits.get("down")) @ view.down_FD.to(h_NF.dtype)


def _keep(values: Tensor, limit: float | None) -> Tensor:
    return values if limit is None else values.masked_fill(values.abs() <= limit, 0)
