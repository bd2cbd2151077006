"""Writing new FFN widths into a model's config. The right fields are found by trying, not from a table of names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_UNSET = ("n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size")
"""Names of fields for which None stands for the usual width."""

Field = tuple[int, str]
"""A field of a config: the place of its part among the nested configs, and the field's name."""


def tell_config(model: nn.Module, widths: Mapping[int, int]) -> bool | None:
    """Write new FFN widths into the model's config, in place.

    A choice of fields is right if the model's class, built from the changed config without memory for its weights, has
    parameters of the shapes that the model has now.

    Args:
        model: a model whose FFNs have the new widths already.
        widths: new width by old width.

    Returns:
        Whether fields were found; None if the model has no config. If none were found, the config is as it was.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    shapes = _shapes(model)
    for fields in _choices(config, widths):
        trial = copy.deepcopy(config)
        _write(trial, fields)
        if _built_shapes(type(model), trial) == shapes:
            for own in _configs_of(model):
                _write(own, {field: width for field, width in fields.items() if _same(own, config, field)})
            return True
    return False


def _choices(config: Any, widths: Mapping[int, int]) -> Iterator[dict[Field, int]]:
    """Yield the changes to try.

    They are: none; all fields with an old width; each of these alone; and each field that is unset.
    """
    yield {}
    holding: dict[Field, int] = {}
    unset: list[Field] = []
    for place, part in enumerate(_nested(config)):
        for name, value in vars(part).items():
            if type(value) is int and value in widths:
                holding[place, name] = widths[value]
            if value is None and name in _UNSET:
                unset.append((place, name))
    if holding:
        yield holding
        yield from ({field: width} for field, width in holding.items())
    if len(widths) == 1:
        yield from ({field: next(iter(widths.values()))} for field in unset)


def _nested(config: Any) -> list[Any]:
    """Return a config and the configs inside it, always in the same order."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(part for value in inner for part in _nested(value))]


def _write(config: Any, fields: Mapping[Field, int]) -> None:
    parts = _nested(config)
    for (place, name), width in fields.items():
        setattr(parts[place], name, width)


def _configs_of(model: nn.Module) -> list[Any]:
    """Return the model's config, and the other configs that modules inside the model hold."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [model.config, *(config for config in found.values() if config is not model.config)]


def _same(own: Any, config: Any, field: Field) -> bool:
    """Whether the config of a module inside the model has the field that the model's config has."""
    place, name = field
    return len(_nested(own)) > place and name in vars(_nested(own)[place]) and type(own) is type(config)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _built_shapes(model_class: type, config: Any) -> dict[str, torch.Size] | None:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return _shapes(model_class(config))
    except Exception:  # a config may contradict itself, in as many ways as there are models
        return None
