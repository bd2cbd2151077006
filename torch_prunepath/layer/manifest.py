"""What a sparse model is, as a dict that its ``config.json`` carries, and back.

The dict stands in ``config.quantization_config``, the one place that ``from_pretrained`` reads before it loads weights.
A reader that does not know the method skips it and loads the dense model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_prunepath.config import FORMAT_VERSION, FFNSpec, SparsifyConfig, check_tau, check_threshold, num_experts
from torch_prunepath.layer import ExpertsSpec
from torch_prunepath.layer.sparse import Knot

METHOD = "prunepath"
KNOBS = ("tau", "theta_x", "theta_h")
"""What may be set on a layer at any time."""


def check_path(path: Sequence[Knot]) -> None:
    """Check what a layer is set to at each place of a path.

    Raises:
        ValueError: if there are fewer than two places, bytes do not fall, or a setting is out of range.
    """
    if len(path) < 2 or any(b.bytes >= a.bytes for a, b in itertools.pairwise(path)) or not path[-1].bytes > 0:
        raise ValueError("a path needs two or more places, with fewer bytes at each than at the one before")
    for knot in path:
        check_tau(knot.tau)
        check_threshold(knot.theta_x)
        check_threshold(knot.theta_h)


@dataclass(frozen=True)
class LayerManifest:
    """One sparse layer: where it is, how it routes, its tau and budget, whether its router has bias and norm.

    ``theta_x`` and ``theta_h`` are its thresholds on inputs and on neurons, left out of files where they are 0.
    ``made_with`` is the configuration that made it, or None where that is the manifest's; ``path`` is what
    :func:`torch_prunepath.set_budget` measured, or None.
    """

    ffn: FFNSpec
    experts: ExpertsSpec
    tau: float
    budget: float = 1.0
    router_bias: bool = False
    router_norm: bool = False
    made_with: SparsifyConfig | None = None
    theta_x: float = 0.0
    theta_h: float = 0.0
    path: tuple[Knot, ...] | None = None

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_threshold(self.theta_x)
        check_threshold(self.theta_h)
        if self.path is not None:
            check_path(self.path)
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
            path = layer["path"]
            layer["path"] = path and {name: [knot[i] for knot in path] for i, name in enumerate(Knot._fields)}
            for optional in ("made_with", "path"):
                if layer[optional] is None:
                    del layer[optional]
            for theta in ("theta_x", "theta_h"):
                if layer[theta] == 0.0:
                    del layer[theta]
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


def _factored(layers: Sequence[dict[str, Any]], apart: Sequence[str] = KNOBS) -> tuple[dict[str, Any], list[Any]]:
    """What all layers share, and what remains of each; ``_merged`` puts them together again.

    tau and thresholds stay with each layer, also where all are equal: a person who reads the file looks for them.
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
    columns = data.get("path")
    path = None
    if columns is not None:
        path = tuple(map(Knot, *(columns[name] for name in Knot._fields)))
        if {len(column) for column in columns.values()} != {len(path)}:
            raise ValueError("a path has columns of different lengths")
    parts: dict[str, Any] = {"ffn": FFNSpec(**data["ffn"]), "experts": ExpertsSpec(**data["experts"])}
    parts |= {"made_with": made_with, "path": path}
    return LayerManifest(**{**data, **parts})
