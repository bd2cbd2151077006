"""Makes ``from_pretrained`` rebuild sparse models, as a quantization method that quantises nothing.

transformers builds the dense model without weights, this method makes it sparse
(:func:`torch_prunepath.layer.manifest.rebuild`), and the ordinary loading fills in weights, routers and permutations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

# From the very modules: this one may be imported while the packages around them are only half imported.
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.manifest import METHOD, Manifest, rebuild, resolve, saved_names
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.sparsity import set_tau


@register_quantization_config(METHOD)
class PrunePathQuantizationConfig(QuantizationConfigMixin):
    """The manifest in ``config.json`` as transformers wants to see it.

    Raises:
        ValueError: if the checkpoint's format is newer than this package, or its manifest is damaged.
    """

    def __init__(self, **data: Any) -> None:
        self.manifest = Manifest.from_dict(data)
        self.quant_method = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return self.manifest.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


@register_quantizer(METHOD)
class PrunePathQuantizer(HfQuantizer):
    """Rebuilds a sparse model around the loading of its weights."""

    requires_calibration = True
    quantization_config: PrunePathQuantizationConfig

    @property
    def is_trainable(self) -> bool:
        """Sparse models train like dense ones."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without adapters as well."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` works."""
        return True

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """``save_pretrained`` works."""
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        manifest = self.quantization_config.manifest
        rebuild(model, manifest)
        _check_files(model, kwargs.get("checkpoint_files"))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        manifest = self.quantization_config.manifest
        for view in [resolve(model, layer.ffn) for layer in manifest.layers]:
            _check_permutation(view)
            view.lay_out_()
        taus = [layer.tau for layer in manifest.layers]
        for module in sparse_layers(model).values():
            # Made without data while the model had none.
            module.tau = torch.zeros((), dtype=torch.float32, device=module.permutation.device)
        set_tau(model, taus)
        # From here on a model like one that sparsify() made: nothing about it is quantised.
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if name in model.__dict__:
                delattr(model, name)
        return model


def _check_permutation(view: FFNView) -> None:
    site = view.up if view.spec.split else view.owner
    order_F: torch.Tensor = site.permutation  # type: ignore[assignment]
    if not torch.equal(order_F.sort().values.cpu(), torch.arange(view.spec.ffn_size, dtype=order_F.dtype)):
        raise ValueError(
            f"damaged checkpoint: {view.site}.permutation is not a permutation of its neurons; "
            "save or download the model again"
        )


def _check_files(model: nn.Module, files: Any) -> None:
    """Refuse a checkpoint that lacks routers: transformers would fill them with random numbers."""
    if not isinstance(files, list | tuple) or not all(str(file).endswith(".safetensors") for file in files):
        return
    present: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                present |= {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"damaged checkpoint file {file} ({error}): save or download the model again") from error
    stored = _stored_layers(present)
    layers = list(sparse_layers(model).values())
    # transformers renames some classes' keys when it saves and when it loads: a layer that is not there under its own
    # name must be there under another one, with the same shapes.
    own = {layer.name: next((n for n in saved_names(model, layer.name) if n in stored), None) for layer in layers}
    renamed = {name: shapes for name, shapes in stored.items() if name not in own.values()}
    for layer in layers:
        expected = {tensor: tuple(value.shape) for tensor, value in _tensors_of(layer).items()}
        name = own[layer.name]
        if name is None:
            name = next((other for other, shapes in renamed.items() if shapes == expected), None)
            renamed.pop(name, None)
        _compare(layer.name, stored.get(name, {}), expected)


def _tensors_of(layer: RoutedExperts) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a sparse layer beside the dense model's weights."""
    found = {"router.weight": layer.router.weight, "router.bias": layer.router.bias, "permutation": layer.permutation}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _stored_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str | None, dict[str, tuple[int, ...]]]:
    """The tensors that sparse layers have beside the dense model's, in a checkpoint's files: by layer, with shapes."""
    found: dict[str | None, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = re.fullmatch(r"(?:(.*)\.)?(router\.weight|router\.bias|permutation)", key)
        if match:
            found.setdefault(match[1] or "", {})[match[2]] = shape
    return found


def _compare(name: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for tensor, shape in expected.items():
        if tensor not in found:
            raise ValueError(
                f"damaged checkpoint: {name}.{tensor} is missing from the weights; save or download the model again"
            )
        if found[tensor] != shape:
            raise ValueError(
                f"{name}.{tensor} has shape {found[tensor]}, but config.json says {shape}: config.json and the "
                "weights do not belong together"
            )
