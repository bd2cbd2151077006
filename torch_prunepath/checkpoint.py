"""Reading sparse checkpoints; ``model.save_pretrained(directory)`` writes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch_prunepath.config import num_experts
from torch_prunepath.layer.ffn import site_name
from torch_prunepath.layer.manifest import METHOD, Manifest


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of a checkpoint directory from its ``config.json``; no weights are read.

    Raises:
        ValueError: if the directory is no sparse checkpoint, is damaged, or has a newer format.
    """
    return Manifest.from_dict(_read_quantization_config(directory))


def _read_quantization_config(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} is no checkpoint: it has no config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): save or download the model again") from error
    manifest = data.get("quantization_config") if isinstance(data, dict) else None
    if not isinstance(manifest, dict) or manifest.get("quant_method") != METHOD:
        raise ValueError(
            f"{directory} holds no sparse model: make one with torch_prunepath.sparsify and save_pretrained"
        )
    return manifest


def load(directory: str | Path, **kwargs: Any) -> Any:
    """Load a sparse model, with the class from which it was saved.

    Args:
        directory: a directory that ``save_pretrained`` wrote.
        **kwargs: further arguments of ``from_pretrained``, for instance ``dtype`` or ``device_map``.

    Raises:
        ValueError: if the directory is no sparse checkpoint, a part of it is missing or damaged, or it has a newer
            format.
    """
    import transformers
    from safetensors import SafetensorError

    import torch_prunepath.integrations.transformers  # noqa: F401  (registers the method)

    directory = Path(directory)
    read_manifest(directory)
    architectures = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    cls = getattr(transformers, architectures[0], None)
    if cls is None:
        raise ValueError(
            f"{directory} was saved from {architectures[0] or 'an unnamed class'}, which transformers "
            f"{transformers.__version__} does not have: load it with that class's own from_pretrained"
        )
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        raise ValueError(f"{directory} holds no weights (*.safetensors): save or download the model again")
    try:
        return cls.from_pretrained(directory, **kwargs)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"the weights in {directory} cannot be read ({error}): save or download the model again"
        ) from error


def read_info(directory: str | Path) -> dict[str, Any]:
    """Read what a checkpoint directory holds: the config, and each layer's FFN, experts, tau, thresholds and budget.

    All of it is ready for JSON.

    Raises:
        ValueError: if the directory is no sparse checkpoint, is damaged, or has a newer format.
    """
    data = _read_quantization_config(directory)
    manifest = Manifest.from_dict(data)
    layers = [
        {
            "name": site_name(layer.ffn),
            "hidden_size": layer.ffn.hidden_size,
            "ffn_size": layer.ffn.ffn_size,
            "gated": layer.ffn.gated,
            "activation": layer.ffn.activation,
            "experts": num_experts(layer.ffn.ffn_size, layer.experts.expert_size),
            "expert_size": layer.experts.expert_size,
            "shared_experts": layer.experts.shared,
            "router_norm": layer.router_norm,
            "rule": layer.experts.rule,
            "gate": layer.experts.gate,
            "tau": layer.tau,
            "theta_x": layer.theta_x,
            "theta_h": layer.theta_h,
            "budget": layer.budget,
        }
        for layer in manifest.layers
    ]
    return {"format_version": data["format_version"], "config": dataclasses.asdict(manifest.config), "layers": layers}
