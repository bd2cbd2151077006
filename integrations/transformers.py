"""Makes ``from_pretrained`` rebuild sparse models, as a quantization method that quantises nothing.

transformers builds the dense model without weights, this method makes it sparse
(:func:`torch_prunepath.layer.manifest.rebuild`), and the ordinary loading fills in weights, routers and permutations.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

# From the very modules: this one may be imported while the packages around them are only half imported.
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

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
    for layer in sparse_layers(model).values():
        tensors = ["router.weight", "permutation", *(["router.bias"] if layer.router.bias is not None else [])]
        for tensor in tensors:
            found = [present.get(f"{name}.{tensor}") for name in saved_names(model, layer.name)]
            shape = next((shape for shape in found if shape is not None), None)
            if shape is None:
                raise ValueError(
                    f"damaged checkpoint: {layer.name}.{tensor} is missing from the weights; "
                    "save or download the model again"
                )
            expected = tuple(layer.get_parameter(tensor).shape if "." in tensor else layer.permutation.shape)
            if shape != expected:
                raise ValueError(
                    f"{layer.name}.{tensor} has shape {shape}, but config.json says {expected}: config.json and the "
                    "weights do not belong together"
                )
