"""Making a model's config say how wide its FFNs are, by trying which field does it rather than by a table of names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_UNSET = ("n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size")
"""Fields that mean "as wide as usual" where they are None."""

Field = tuple[int, str]
"""Which of the (nested) configs, and the name of a field."""


def tell_config(model: nn.Module, widths: Mapping[int, int]) -> bool | None:
    """Write new FFN widths into the model's config, in place.

    A choice of fields is right if the model's class, built from the changed config without memory for its weights, has
    parameters of the shapes that the model has now.

    Args:
        model: its FFNs have the new widths already.
        widths: new width by old width.

    Returns:
        Whether it worked; None if the model has no config. If it did not, the config is as it was.
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
    """What to try: nothing (no width changed), every field that holds an old width, each of them alone, unset ones."""
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
    """A config and those inside it, always in the same order."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(part for value in inner for part in _nested(value))]


def _write(config: Any, fields: Mapping[Field, int]) -> None:
    parts = _nested(config)
    for (place, name), width in fields.items():
        setattr(parts[place], name, width)


def _configs_of(model: nn.Module) -> list[Any]:
    """The config, and the copies of it that stacks inside the model keep."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [model.config, *(config for config in found.values() if config is not model.config)]


def _same(own: Any, config: Any, field: Field) -> bool:
    """Whether a stack's config has the field that the model's has."""
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
