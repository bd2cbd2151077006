"""The front door: a dense model becomes a sparse one, in place, and back.

Everything is decided first, on the untouched model (:mod:`torch_prunepath.experts.plan`), and then applied layer by
layer (:func:`torch_prunepath.layer.swap.make_all_routed`), so that what fails or is interrupted leaves the model as it
was.

Shapes: N calibration tokens, D hidden size, F neurons, E experts of S neurons.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_prunepath.config import SparsifyConfig, check_tau, num_experts
from torch_prunepath.discover import Discovery, Which, discover, in_one_line
from torch_prunepath.discover.choose import listed
from torch_prunepath.discover.find import nothing_found
from torch_prunepath.experts.budget import allocate
from torch_prunepath.experts.plan import LayerPlan, plan_layers
from torch_prunepath.inputs.check import check_weights
from torch_prunepath.inputs.data import Inputs, as_inputs, can_sample, sampled_inputs
from torch_prunepath.layer import ExpertsSpec, is_sparse
from torch_prunepath.layer.ffn import FFNView, site_name
from torch_prunepath.layer.refuse import refuse_wrapped, refuse_wrapper
from torch_prunepath.layer.saving import attach, detach, is_attached
from torch_prunepath.layer.swap import Swap, make_all_routed, make_dense
from torch_prunepath.layer.views import sparse_layers, sparse_views
from torch_prunepath.sparsity import layer_tau

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound=nn.Module)

FEWEST_TOKENS = 8
"""With fewer tokens for calibration, something was forgotten."""


@torch.inference_mode(mode=False)
def sparsify(
    model: ModelT,
    tau: float = 0.9,
    *,
    config: SparsifyConfig | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> ModelT:
    """Turn the feed-forward networks (FFNs) of a model into routed experts, in place (PrunePath, arXiv 2605.28283).

    Names and shapes of the model's parameters stay; each sparse layer gains ``router`` and ``permutation``. Nothing is
    trained: neurons are grouped and routers fitted on calibration data.

    Conversion needs the memory of one more layer, and leaves nothing behind but routers and permutations. Calibration
    before it needs the activations of one forward pass over ``config.calibration_tokens`` tokens, of one FFN at a time,
    and, with ``budget="sensitivity"``, those of a backward pass over one row and a ``[D, D]`` matrix for each FFN.

    What looks like an FFN and cannot be made sparse stays as it is, and a warning in the log says which and why.

    Args:
        model: a Hugging Face model, or any module whose FFNs :func:`torch_prunepath.discover.find_ffns` finds.
        tau: router mass that the active experts must reach, in (0, 1]; 1 computes the dense model. See
            :func:`torch_prunepath.set_tau` and :func:`torch_prunepath.set_sparsity` to change it later.
        config: how experts and routers are built; the default is the best that was measured.
        calibration: texts or chats (with ``tokenizer``), token ids ``[B, T]``, dicts of model inputs, or an iterable of
            these, such as a data loader or a data set; see :func:`torch_prunepath.inputs.data.as_inputs`. With None a
            causal language model samples its own text; other models are converted from their weights alone.
        tokenizer: for texts. Rows of text start with what it puts in front of every text; in a causal model that counts
            in no statistic.
        include: the FFNs to make sparse; None: all. A name or a pattern is one or more whole parts of a dotted name,
            with ``*``, ``?`` and ``[...]`` as in file names, and means the FFNs with these parts anywhere in their
            names: ``"language_model"`` all inside a module of this name, ``"model.layers.0.*"`` the first layer's. A
            function of an :class:`FFNSpec` and a list of names and functions do as well.
        exclude: which of these to leave dense, likewise: ``exclude="vision_tower"``. The data must reach only what is
            made sparse.
        progress: show progress bars.

    Returns:
        The same model.

    Raises:
        ValueError: if tau is invalid, nothing can be made sparse, the model is sparse already, wrapped, quantised or
            without weights yet (meta device), its weights are not all finite, or the data does not fit; if a pattern
            means no FFN, or none is left. The model is as it was.
        TypeError: if this is no model, or config, data, ``include`` or ``exclude`` are of another type.

    Example::

        model = AutoModelForCausalLM.from_pretrained(name)
        torch_prunepath.sparsify(model, tau=0.9)
    """
    tau = check_tau(tau)
    config = SparsifyConfig() if config is None else config
    if not isinstance(config, SparsifyConfig):
        raise TypeError(
            f"config must be a SparsifyConfig, not a {type(config).__name__}: SparsifyConfig(expert_size=8)"
        )
    refuse_wrapper(model)
    _refuse(model)
    check_weights(model)
    found = discover(model, include, exclude)
    if not found.specs:
        raise nothing_found(model, found)
    views = [FFNView(model, spec) for spec in found.specs]
    _refuse_all_shared(views, config)
    inputs = None
    if config.needs_data:
        config, inputs = _calibration(model, config, calibration, tokenizer, progress)
    elif calibration is not None:
        raise ValueError(f"calibration is given, but nothing in {config} uses it: leave it out, or change the config")
    plans = plan_layers(model, views, config, inputs, progress)
    curves = {site: plan.curve for site, plan in plans.items() if plan.curve is not None}
    budgets = allocate(curves) if curves else {view.site: 1.0 for view in views}
    make_all_routed([_swap(view, plans[view.site], config, tau, budgets[view.site]) for view in views])
    attach(model)
    _tell_what_stays(found)
    return model


def _tell_what_stays(found: Discovery) -> None:
    """Log which FFNs stay dense: a warning where nobody asked for it."""
    converted, skipped, excluded = len(found.specs), len(found.skipped), len(found.excluded)
    if skipped:
        logger.warning(
            "%d of %d FFNs were not converted: %s", skipped, converted + skipped + excluded, in_one_line(found.skipped)
        )
    if excluded:
        names = listed(site_name(spec) for spec in found.excluded)
        logger.info("%d of %d FFNs were left out as asked: %s", excluded, converted + skipped + excluded, names)


def _refuse(model: nn.Module) -> None:
    if any(is_sparse(module) for module in model.modules()):
        raise ValueError("the model is sparse already: use set_tau to change it, or densify(model) first")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was made under torch.inference_mode, whose tensors cannot be changed or differentiated later: "
            "make or load it outside of it (torch.no_grad is as good there)"
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError("the model has parameters without data (meta device): load its weights first")
    if is_attached(model):
        raise ValueError(
            "the model is dense, but its config is that of a sparse checkpoint: load that one with from_pretrained, or "
            "delete model.config.quantization_config to make this model sparse"
        )
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError(
            "the model carries a quantization_config: make it sparse before quantising, or load it unquantised "
            "(a model dequantised from GGUF: delete model.config.quantization_config)"
        )
    if getattr(model, "is_quantized", False) and getattr(model, "quantization_method", None) != "gguf":
        raise ValueError("the model is quantised: make it sparse before quantising, or load it unquantised")


def _refuse_all_shared(views: Sequence[FFNView], config: SparsifyConfig) -> None:
    for view in views:
        experts = num_experts(view.spec.ffn_size, config.expert_size)
        if config.num_shared(view.spec.ffn_size) >= experts:
            raise ValueError(
                f"shared_experts={config.shared_experts} leaves no expert to choose: {view.site} has {experts} of "
                f"{config.expert_size} neurons; share fewer, or make experts smaller"
            )


def _calibration(
    model: nn.Module, config: SparsifyConfig, calibration: Any, tokenizer: Any, progress: bool
) -> tuple[SparsifyConfig, Inputs | None]:
    """Inputs to calibrate on; or, where there is nothing, a config that does without."""
    if calibration is None and can_sample(model):
        return config, sampled_inputs(model, config.calibration_tokens, config.seed, progress, tokenizer)
    if calibration is None and config.shared_experts:
        raise ValueError(
            f"shared experts hold the neurons that contribute most on calibration data, and {type(model).__name__} "
            "cannot write its own: pass calibration="
        )
    if calibration is None:
        logger.warning(
            "no calibration data, and %s cannot write its own: grouping neurons by their weights and starting routers "
            "at centroids; pass calibration= for much better routing",
            type(model).__name__,
        )
        return dataclasses.replace(config, partition="kmeans", router="centroid", budget="uniform"), None
    inputs = as_inputs(calibration, model, tokenizer, config.calibration_tokens)
    tokens = inputs.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.numel() < FEWEST_TOKENS:
        raise ValueError(f"{tokens.numel()} calibration tokens are too few: pass a few thousand")
    return config, inputs


def _swap(view: FFNView, plan: LayerPlan, config: SparsifyConfig, tau: float, budget: float) -> Swap:
    shared = config.num_shared(view.spec.ffn_size)
    experts = ExpertsSpec(config.expert_size, config.rule, config.gate, config.gate_offset, shared)
    return Swap(view, experts, plan.router, plan.order_F, layer_tau(tau, budget), budget, config)


def densify(model: ModelT) -> ModelT:
    """Undo :func:`sparsify` in place: every weight bit-exactly where it was, routers gone.

    Raises:
        ValueError: if the model holds no sparse FFN, or adapters are on one: their weights would stay in expert order.
            The model is as it was.
    """
    layers, views = sparse_layers(model), sparse_views(model)
    for name, view in views.items():
        refuse_wrapped(name, layers[name], view)
    for name, view in views.items():
        order_F = layers[name].permutation
        make_dense(view)
        view.unpermute_(order_F)
    detach(model)
    return model
