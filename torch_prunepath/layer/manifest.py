"""What a sparse model is, as a dict that its ``config.json`` carries, and back.

The dict stands in ``config.quantization_config``, the one place that ``from_pretrained`` reads before it loads weights.
A reader that does not know the method skips it and loads the dense model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_prunepath.config import FORMAT_VERSION, FFNSpec, SparsifyConfig, check_tau, num_experts
from torch_prunepath.layer import ExpertsSpec

METHOD = "prunepath"


@dataclass(frozen=True)
class LayerManifest:
    """One sparse layer: where it is, how it routes, its tau and budget, whether its router has bias and norm.

    ``made_with`` is the configuration that made it, or None where that is the manifest's.
    """

    ffn: FFNSpec
    experts: ExpertsSpec
    tau: float
    budget: float = 1.0
    router_bias: bool = False
    router_norm: bool = False
    made_with: SparsifyConfig | None = None

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if not self.budget > 0:
            raise ValueError(f"{self.ffn.name}: budget={self.budget} must be positive")
        if self.experts.expert_size < 1:
            raise ValueError(f"{self.ffn.name}: expert_size={self.experts.expert_size} must be at least 1")
        experts = num_experts(self.ffn.ffn_size, self.experts.expert_size)
        if not 0 <= self.experts.shared < experts:
            raise ValueError(f"{self.ffn.name}: {self.experts.shared} of {experts} experts cannot be shared")


@dataclass(frozen=True)
class Manifest:
    """A whole model: its layers, and the configuration that made the first of them."""

    layers: tuple[LayerManifest, ...]
    config: SparsifyConfig

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        whole = dataclasses.asdict(self)
        for layer in whole["layers"]:
            if layer["made_with"] is None:
                del layer["made_with"]
        shared, layers = _factored(whole["layers"])
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "config": whole["config"],
            "shared": shared,
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`to_dict` wrote, in this format or an earlier one.

        Raises:
            ValueError: if the format is newer than this package, the data is damaged, or the layers select by the rule
                of a baseline, which checkpoints once held.
        """
        version = data.get("format_version")
        if not isinstance(version, int):
            raise ValueError("damaged prunepath manifest: no format_version; save the model again")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has prunepath format {version}, but the installed torch_prunepath reads up to "
                f"{FORMAT_VERSION}: upgrade torch_prunepath"
            )
        try:
            shared = data["shared"] if version >= 2 else {}
            layers = [_merged(shared, layer) for layer in data["layers"]]
            foreign = next((rule for layer in layers if (rule := layer.pop("selection", None)) is not None), None)
            if foreign is None:
                return cls(tuple(map(_layer, layers)), SparsifyConfig(**data["config"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"damaged prunepath manifest ({error}): save the model again") from error
        raise ValueError(
            f"this checkpoint selects experts by {foreign!r}, the rule of a baseline, which checkpoints cannot hold: "
            "convert the dense model with torch_prunepath.baselines again, and load these weights by load_state_dict"
        )


def _factored(layers: Sequence[dict[str, Any]], apart: Sequence[str] = ("tau",)) -> tuple[dict[str, Any], list[Any]]:
    """What all layers share, and what remains of each; ``_merged`` puts them together again.

    tau stays with each layer, also where all are equal: it is what a person who reads the file looks for.
    """
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in layers]
    for key in dict.fromkeys(key for layer in layers for key in layer):
        if not all(key in layer for layer in layers):  # a few were made with a configuration of their own
            for rest, layer in zip(own, layers, strict=True):
                rest |= {key: layer[key]} if key in layer else {}
            continue
        values = [layer[key] for layer in layers]
        if isinstance(values[0], dict):
            part, remains = _factored(values, apart=("name",))
            shared[key] = part
            for layer, rest in zip(own, remains, strict=True):
                if rest:
                    layer[key] = rest
        elif key not in apart and all(value == values[0] for value in values):
            shared[key] = values[0]
        else:
            for layer, value in zip(own, values, strict=True):
                layer[key] = value
    return shared, own


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: {**value, **own.get(key, {})} for key, value in shared.items() if isinstance(value, Mapping)}
    return {**shared, **own, **nested}


def _layer(data: Mapping[str, Any]) -> LayerManifest:
    made_with = SparsifyConfig(**data["made_with"]) if "made_with" in data else None
    parts = {"ffn": FFNSpec(**data["ffn"]), "experts": ExpertsSpec(**data["experts"]), "made_with": made_with}
    return LayerManifest(**{**data, **parts})
