"""Making a loaded model sparse, or as sparse as asked, for a command that only measures: nothing is saved.

The calibration data is that of ``prunepath sparsify``.

Shapes: N windows of C tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor, nn

from torch_prunepath.budget import set_budget
from torch_prunepath.config import SparsifyConfig, check_bytes, check_sparsity, check_tau
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.conversion import sparsify
from torch_prunepath.discover import Which
from torch_prunepath.evaluation.corpus import CONTEXT, Corpus, load_corpus, windows
from torch_prunepath.evaluation.models import longest_context
from torch_prunepath.inputs.check import check_ids
from torch_prunepath.inputs.front import as_batch
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.manifest import KNOBS
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.sparsity import layer_tau, set_sparsity

SEARCH_WINDOWS = 4
"""Largest number of windows on which the tau of a sparsity is searched. Few, because every step of the search runs the
model over them; 4 is a guess."""

SMALLEST_STEP = 2e-7
"""Largest difference between a layer's tau and the number that was set, for tau near 1: float32 numbers below 1 are
6e-8 apart, and this is about three of those steps. A guess."""

SETTINGS = tuple(field.name for field in dataclasses.fields(SparsifyConfig))
"""Names of the settings that an argument of a command may give."""

CHOICES = ("include", "exclude")
"""Names of the arguments that say which FFNs are made sparse."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """The settings that a command's arguments ask for, checked; ``settings`` are fields of ``SparsifyConfig``.

    ``include`` and ``exclude`` say which FFNs are made sparse, as for :func:`torch_prunepath.sparsify`.
    """

    tau: float | None
    sparsity: float | None
    text: str | None
    settings: dict[str, Any]
    include: Any = None
    exclude: Any = None
    bytes: float | None = None

    @classmethod
    def of(cls, tau: Any, sparsity: Any, bytes: Any, text: str | None, options: dict[str, Any]) -> Asked:
        """Remove the settings from ``options``, and check them.

        Raises:
            UserError: if a value is out of range, two of tau, sparsity and bytes are given, or the text cannot be read.
        """
        settings = {name: options.pop(name) for name in SETTINGS if name in options}
        tau, sparsity, bytes = _number("tau", tau), _number("sparsity", sparsity), _number("bytes", bytes)
        if bytes is not None and (tau is not None or sparsity is not None):
            other = "tau" if sparsity is None else "sparsity"
            raise UserError(
                f"{other} and bytes are both given, but bytes sets tau and thresholds: give only one of them"
            )
        if tau is not None and sparsity is not None:
            raise UserError("tau and sparsity are both given, but sparsity searches for a tau: give only one of them")
        with as_user_error(ValueError, TypeError):
            SparsifyConfig(**settings)
            tau = None if tau is None else check_tau(tau)
            sparsity = None if sparsity is None else check_sparsity(sparsity)
            bytes = None if bytes is None else check_bytes(bytes)
        if text is not None:
            load_corpus(text)  # only to see now whether it can be read
        include, exclude = (_patterns(options.pop(name, None)) for name in CHOICES)
        return cls(tau, sparsity, text, settings, include, exclude, bytes)

    @property
    def about_experts(self) -> list[str]:
        """Names of the arguments that say how experts are made, and so belong to a dense model."""
        return [*self.settings, *(name for name in CHOICES if getattr(self, name) is not None)]


def _patterns(value: Any) -> Any:
    """Return the patterns in a text, in which a semicolon separates them; anything else as it is."""
    return value.split(";") if isinstance(value, str) else value


def _number(name: str, value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={value!r} is no number: give one such as {name}=0.8") from None


def fit_windows(corpus: Corpus, model: Any, tokenizer: Any, tokens: int) -> Tensor:
    """Cut the windows to which routers are fitted from a text's calibration part: int64 ``[N, C]``.

    Raises:
        UserError: if the text does not fill one window.
        ValueError: if the tokenizer gives ids that the model does not have.
    """
    context = min(CONTEXT, longest_context(model))
    count = max(1, tokens // context)
    window_NC = windows(corpus.calibration, tokenizer, context=context, count=count, part="text for calibration")
    check_ids(window_NC, model, tokenizer, "the text")
    return window_NC


def make_sparse(
    model: nn.Module,
    window_NC: Tensor,
    config: SparsifyConfig,
    front: int = 0,
    *,
    include: Which | None = None,
    exclude: Which | None = None,
) -> None:
    """Sparsify a dense model in place, with every expert active.

    The first ``front`` tokens of each window are context only.

    Raises:
        ValueError: if :func:`torch_prunepath.sparsify` refuses the model, config, data or choice of FFNs.
    """
    data = as_batch(window_NC, front) if config.needs_data else None
    sparsify(model, tau=1.0, config=config, calibration=data, include=include, exclude=exclude)


def reach_sparsity(model: nn.Module, sparsity: float, window_NC: Tensor, front: int = 0) -> float:
    """Set and return the tau whose realised sparsity on some of the windows is ``sparsity``.

    The first ``front`` tokens of each window are context only.

    Raises:
        ValueError: if no tau realises that sparsity.
    """
    return set_sparsity(model, sparsity, as_batch(search_windows(window_NC), front))


def reach_bytes(model: nn.Module, share: float, window_NC: Tensor, front: int = 0) -> float:
    """Measure the path of the model's budget on the windows, set the place where a token reads ``share`` of the bytes.

    The first ``front`` tokens of each window are context only.

    Returns:
        The share that was read there.

    Raises:
        ValueError: if no place reads so little.
    """
    return set_budget(model, share, as_batch(window_NC, front))


def holds_path(model: nn.Module) -> bool:
    """Whether all sparse layers have a path along which a budget moves."""
    return all(layer.path for layer in sparse_layers(model).values())


def in_force(model: nn.Module) -> dict[str, dict[str, float]]:
    """What layers are set to, ready for JSON: ``tau_per_layer``, ``theta_x_per_layer`` and ``theta_h_per_layer``."""
    layers = sparse_layers(model)
    return {
        f"{knob}_per_layer": {name: float(getattr(layer, knob)) for name, layer in layers.items()} for knob in KNOBS
    }


def search_windows(window_NC: Tensor) -> Tensor:
    """Choose the windows on which a sparsity is searched: at most ``SEARCH_WINDOWS``, evenly spread."""
    return window_NC[:: -(-len(window_NC) // SEARCH_WINDOWS)]


def holds_sparse_layers(model: nn.Module) -> bool:
    """Whether any layer of the model is sparse."""
    return any(isinstance(module, RoutedExperts) for module in model.modules())


def model_tau(model: nn.Module) -> float | None:
    """Return the tau with which ``set_tau`` gives the layers the tau that they have; None if there is no such number.

    It has six digits, because each layer keeps tau in float32 and changed by the layer's budget.
    """
    layers = [(float(layer.tau), layer.budget) for layer in sparse_layers(model).values()]
    # From the layer whose tau is nearest to 0.5: near 0 and near 1, few digits of the model's tau are left.
    value, budget = min(layers, key=lambda layer: abs(layer[0] - 0.5))
    tau = 1.0 if value >= 1.0 else float(f"{-math.expm1(math.log1p(-value) / budget):.6g}")
    if not 0.0 < tau <= 1.0:
        return None
    if all(
        math.isclose(layer_tau(tau, budget), value, rel_tol=1e-4, abs_tol=SMALLEST_STEP) for value, budget in layers
    ):
        return tau
    return None
