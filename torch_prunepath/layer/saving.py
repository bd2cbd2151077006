"""The manifest of a model as it is now, and where ``save_pretrained`` finds it: in the model's config."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from torch_prunepath.config import FFNSpec, SparsifyConfig
from torch_prunepath.layer.manifest import METHOD, LayerManifest, Manifest
from torch_prunepath.layer.sparse import RoutedExperts, SparseFFN, SparseUp
from torch_prunepath.layer.views import owner_of

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names of modules that torch puts in between, and leaves out of the state dict's keys."""


def describe(model: nn.Module) -> Manifest:
    """Say what :func:`torch_prunepath.rebuild` needs to know to make a model of the same class as sparse as this one.

    Layers are named as they are called in ``model`` now, wherever they were when they were made sparse.

    Raises:
        ValueError: if the model holds no sparse FFN, or something was put between the halves of one.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseFFN | SparseUp)
    }
    if not layers:
        raise ValueError("the model holds no sparse FFN: call torch_prunepath.sparsify(model) first")
    config = next(iter(layers.values())).made_with
    assert config is not None
    return Manifest(tuple(_describe(name, layer, config) for name, layer in layers.items()), config)


def _describe(name: str, layer: RoutedExperts, config: SparsifyConfig) -> LayerManifest:
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    ffn: FFNSpec = dataclasses.replace(layer.ffn, name=owner_of(name, layer))
    return LayerManifest(
        ffn,
        layer.experts,
        float(layer.tau),
        layer.budget,
        layer.router.bias is not None,
        layer.router_norm,
        None if layer.made_with == config else layer.made_with,
        float(layer.theta_x),
        float(layer.theta_h),
        layer.path,
    )


def attach(model: nn.Module) -> None:
    """Put the model's manifest into its config, and end what :func:`forbid_saving` began.

    Models without a config are left alone.
    """
    _allow_saving(model)
    if _has_config(model):
        model.config.quantization_config = describe(model).to_dict()  # type: ignore[union-attr]


def refresh(model: nn.Module) -> None:
    """Bring every manifest up to date that the config of a model, or of one inside of it, carries already.

    Wrappers (``torch.compile``'s, PEFT's, those for several devices) are seen through.
    """
    seen: set[int] = set()
    for module in model.modules():
        config = vars(module).get("config")
        # Layers of a model hold its config as well: the first module that has it is the model.
        if id(config) in seen or hasattr(type(module), "get_base_model") or not _carries_manifest(config):
            continue
        seen.add(id(config))
        if _holds_sparse(module):
            attach(module)


def detach(model: nn.Module) -> None:
    """Take the manifest out of the model's config, and end what :func:`forbid_saving` began."""
    _allow_saving(model)
    if is_attached(model):
        del model.config.quantization_config  # type: ignore[union-attr]


def is_attached(model: nn.Module) -> bool:
    """Whether the model's config carries a manifest."""
    return _has_config(model) and _carries_manifest(model.config)


def _holds_sparse(model: nn.Module) -> bool:
    return any(isinstance(module, SparseFFN | SparseUp) for module in model.modules())


def _has_config(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "to_dict")


def _carries_manifest(config: Any) -> bool:
    data = getattr(config, "quantization_config", None)
    if data is None:
        return False
    # transformers has it as an object of ours while it loads a model, and in a config that it was given.
    method = data.get("quant_method") if isinstance(data, Mapping) else getattr(data, "quant_method", None)
    return bool(method == METHOD)


@contextlib.contextmanager
def described(model: nn.Module) -> Iterator[None]:
    """Have the model's config, within this context, say what the model holds: its manifest, or none if it is dense.

    Manifests in the configs of its parts, whose names begin at those parts, are out of the way for that time.

    Raises:
        ValueError: if a part is of a baseline, or quantised by another method as well: no checkpoint can hold that.
    """
    for module in model.modules():
        refused = vars(module).get("save_pretrained")
        if isinstance(refused, SavingRefused):
            raise ValueError(refused.why)
    if not _has_config(model):
        yield
        return
    config: Any = model.config
    if _holds_sparse(model):
        if getattr(config, "quantization_config", None) is not None and not _carries_manifest(config):
            raise ValueError(
                "the model is sparse, and its config carries another quantization_config, which stands where the "
                "checkpoint keeps the sparse layers: delete model.config.quantization_config, or densify(model)"
            )
        attach(model)
    else:
        detach(model)
    hidden = [(part, part.quantization_config) for part in _configs_inside(config) if _carries_manifest(part)]
    for part, _ in hidden:
        del part.quantization_config
    try:
        yield
    finally:
        for part, data in hidden:
            part.quantization_config = data


def _configs_inside(config: Any) -> Iterator[Any]:
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield value
            yield from _configs_inside(value)


@dataclass(frozen=True)
class SavingRefused:
    """Stands where ``save_pretrained`` did, in a model that no checkpoint can hold; pickle and deepcopy keep it."""

    why: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(self.why)


def forbid_saving(model: nn.Module, why: str) -> None:
    """Make ``save_pretrained``, of the model and of models inside and around it, raise ``ValueError(why)``.

    Nothing is written then. :func:`attach` and :func:`torch_prunepath.densify` end that.
    """
    detach(model)
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.save_pretrained = SavingRefused(why)  # type: ignore[assignment]


def _allow_saving(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(vars(module).get("save_pretrained"), SavingRefused):
            del module.save_pretrained
