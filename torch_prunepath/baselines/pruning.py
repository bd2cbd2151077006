"""Static structured pruning: the same neurons are removed for every token.

The result is an ordinary dense model with narrower FFNs. It can be trained (see
:func:`torch_prunepath.baselines.train_dense`). Where its config can hold the new width, it saves and loads as usual.

Shapes: N calibration tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_prunepath.baselines.routed import CALIBRATION_TOKENS, calibration_inputs
from torch_prunepath.baselines.widths import tell_config
from torch_prunepath.config import check_choice, check_sparsity
from torch_prunepath.discover import Which, find_ffns
from torch_prunepath.inputs.data import Inputs
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer.ffn import FFNView, bias_of, is_transposed
from torch_prunepath.progress import progress_bar

logger = logging.getLogger(__name__)

Score = Literal["norm", "rms", "wanda"]

_POWER_AND_ORDER: Mapping[Score, tuple[int, int]] = MappingProxyType({"norm": (1, 2), "rms": (2, 2), "wanda": (2, 1)})
"""For each score, the power in the mean over a neuron's activations, and the order of the norm of its weights."""


@dataclass(frozen=True)
class Pruned:
    """The result of :func:`prune`.

    Attributes:
        kept: the neurons that each FFN kept, int64 on the CPU, ascending, by FFN name.
        sparsity: share of neurons removed, averaged over FFNs.
        storable: whether the model's config holds the new widths, so that ``save_pretrained`` and ``from_pretrained``
            work; None for a model without a config.
    """

    kept: dict[str, Tensor]
    sparsity: float
    storable: bool | None


def prune(
    model: nn.Module,
    sparsity: float,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    score: Score = "norm",
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> Pruned:
    """Remove the same share of neurons from every FFN of a dense model, those with the lowest scores, in place.

    The narrower layers have new parameters, so build optimisers afterwards. If the function fails, the model is as it
    was; for that, it needs memory for the old parameters until it is done.

    Args:
        model: a dense model.
        sparsity: share of each FFN's neurons to remove, in [0, 1); at least one neuron stays.
        calibration: data on which scores are measured, as for :func:`torch_prunepath.sparsify`; with None a causal
            language model samples its own text.
        tokenizer: tokenizer for texts.
        score: importance of a neuron. ``"norm"``: mean norm of the vector that the neuron adds to the output,
            ``mean_t |h_tf| * |down_f|``; ``"rms"``: root of the mean square of that norm, in which rare large
            contributions count more; ``"wanda"``: Wanda's scores (arXiv 2306.11695) of the down-projection,
            ``|W_df| * norm_t(h_tf)``, summed over the neuron's weights, as the structured variant in FLAP's code
            (arXiv 2312.11983) does.
        tokens: largest number of calibration tokens that are used.
        seed: seed of sampled text.
        include: the FFNs to take; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these to leave out.
        progress: show progress bars.

    Raises:
        ValueError: if sparsity is outside [0, 1), there is no FFN, or the data does not fit. The model is as it was.
    """
    check_sparsity(sparsity)
    check_choice("score", score, Score)
    views = [FFNView(model, spec) for spec in find_ffns(model, include, exclude)]
    inputs = calibration_inputs(model, calibration, tokenizer, tokens, seed, progress)
    kept: dict[str, Tensor] = {}
    for name, scores_F in neuron_scores(model, views, inputs, score, progress=progress).items():
        count = max(1, round((1 - sparsity) * len(scores_F)))
        kept[name] = scores_F.sort(descending=True, stable=True).indices[:count].sort().values
    storable = _remove(model, views, kept)
    if storable is False:
        logger.warning(
            "the config of %s has no field for the new width of its FFNs: the model works and trains, but "
            "from_pretrained will not load what save_pretrained writes",
            type(model).__name__,
        )
    shares = [1 - len(kept[view.site]) / view.spec.ffn_size for view in views]
    return Pruned(kept, sum(shares) / len(shares), storable)


def neuron_scores(
    model: nn.Module, views: list[FFNView], inputs: Inputs, score: Score, *, progress: bool = True
) -> dict[str, Tensor]:
    """Compute the importance of each neuron as :func:`prune` defines it, float64 ``[F]`` on the CPU, by FFN name."""
    scores: dict[str, Tensor] = {}
    with progress_bar(total=len(views), desc="scoring neurons", unit="layer", progress=progress) as bar:

        def visit(view: FFNView, x_ND: Tensor) -> None:
            power, order = _POWER_AND_ORDER[score]
            sums = [view.hidden(x).float().abs().pow(power).sum(0).double() for x in x_ND.split(4096)]
            moment_F = torch.stack(sums).sum(0) / len(x_ND)
            weight_F = view.down_FD.float().norm(p=order, dim=-1).double()
            scores[view.site] = (moment_F.pow(1 / power) * weight_F).cpu()
            bar.update()

        visit_inputs(model, views, inputs, visit)
    return scores


def _remove(model: nn.Module, views: list[FFNView], kept: dict[str, Tensor]) -> bool | None:
    """Keep only these neurons of every FFN and write the new widths into the config; undo everything on an error."""
    layers = [
        _ResizableLinear(module) for view in views for module in (view.up, view.gate, view.down) if module is not None
    ]
    try:
        for view in views:
            _narrow(view, kept[view.site])
        return tell_config(model, {view.spec.ffn_size: len(kept[view.site]) for view in views})
    except BaseException:
        for layer in layers:
            layer.put(layer.weight, layer.bias)
        raise


def _narrow(view: FFNView, kept_K: Tensor) -> None:
    kept_K = kept_K.to(view.down_FD.device)
    rows = kept_K if view.spec.fused is None else torch.cat([kept_K, kept_K + view.spec.ffn_size])
    for module, index in ((view.up, rows), (view.gate, kept_K)):
        if module is not None:
            _ResizableLinear(module).keep(index, 0)
    _ResizableLinear(view.down).keep(kept_K, 1)


class _ResizableLinear:
    """A linear layer that can be given weights of other sizes; it remembers those that it has now."""

    def __init__(self, module: Any) -> None:
        # Whether a Conv1D is one shows only while its sizes agree with its weight.
        self.module, self.transposed = module, is_transposed(module)
        self.weight: nn.Parameter = module.weight
        self.bias: nn.Parameter | None = bias_of(module)  # type: ignore[assignment]

    def keep(self, index: Tensor, dim: int) -> None:
        """Keep only these output features (``dim`` 0) or input features (``dim`` 1)."""
        bias = self.bias
        if bias is not None and dim == 0:
            bias = _like(bias, bias.detach()[index])
        dim = 1 - dim if self.transposed else dim
        self.put(_like(self.weight, self.weight.detach().index_select(dim, index)), bias)

    def put(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.module.weight, self.module.bias = weight, bias
        first, second = ("nx", "nf") if self.transposed else ("out_features", "in_features")
        for name, size in zip((first, second), weight.shape, strict=True):
            if hasattr(self.module, name):
                setattr(self.module, name, size)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=parameter.requires_grad)
