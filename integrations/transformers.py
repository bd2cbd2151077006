"""Makes ``from_pretrained`` rebuild sparse models, as a quantization method that quantises nothing.

transformers builds the dense model without weights, this method makes it sparse
(:func:`torch_prunepath.layer.rebuild.build`), and the ordinary loading fills in weights, routers and permutations.
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

from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.manifest import METHOD, Manifest
from torch_prunepath.layer.rebuild import Place, build, find_places
from torch_prunepath.layer.refuse import refuse_shards
from torch_prunepath.layer.saving import attach


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
    _places: list[Place]

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
        _check_readable(kwargs.get("checkpoint_files"))
        manifest = self.quantization_config.manifest
        self._places = find_places(model, manifest)
        build(model, self._places, manifest.config)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for view, layer in self._places:
            site: RoutedExperts = view.up if view.spec.split else view.owner  # type: ignore[assignment]
            refuse_shards(view.site, site)
            _check_tensors(view.site, site)
            view.lay_out_()
            # Made without data while the model had none.
            site.tau = torch.full((), layer.tau, dtype=torch.float32, device=site.permutation.device)
        # From here on a model like one that sparsify() made: nothing about it is quantised.
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if name in model.__dict__:
                delattr(model, name)
        attach(model)
        return model


def _check_readable(files: Any) -> None:
    """Say what to do about a broken file, before anything is read from it."""
    for file in files if isinstance(files, list | tuple) else ():
        if str(file).endswith(".safetensors"):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"damaged checkpoint file {file} ({error}): save or download the model again"
                ) from error


def _check_tensors(name: str, layer: RoutedExperts) -> None:
    """Refuse what transformers did not find in the checkpoint, and filled with random numbers."""
    tensors = {"router.weight": layer.router.weight, "router.bias": layer.router.bias, "permutation": layer.permutation}
    for key, tensor in tensors.items():
        # What is offloaded has no data here; transformers has its file.
        if tensor is not None and not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
            raise ValueError(
                f"damaged checkpoint: {name}.{key} is missing from the weights; save or download the model again"
            )
    order_F = layer.permutation
    if not torch.equal(order_F.sort().values.cpu(), torch.arange(layer.ffn.ffn_size, dtype=order_F.dtype)):
        raise ValueError(
            f"damaged checkpoint: {name}.permutation is not a permutation of its neurons; "
            "save or download the model again"
        )
