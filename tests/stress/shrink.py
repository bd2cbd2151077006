"""Small configs of any architecture: sizes are recognised by what their names mean, and inputs by what a model asks.

Nothing here knows an architecture. What the names do not tell is tried: from the smallest config to the default one,
the first that builds and runs is taken.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, HEADS, WIDTH, LAYERS, VOCABULARY = 32, 4, 64, 2, 128
IMAGE, PATCH, POSITIONS, EXPERTS = 64, 16, 256, 8
LARGEST = 16_000_000
"""Parameters of the largest model that is built: more take too long and too much memory for a sweep."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_size_per_\w+|\w*_vocab_size|codebook_size|n_vocab", VOCABULARY),
    (r"\w*(intermediate|ffn|feedforward|feed_forward)\w*(size|dim)\w*", WIDTH),
    (r"d_ff|dff|dim_ff|n_inner|dim_feedforward|mlp_dim|\w*d_inner", WIDTH),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num", 2),
    (r"\w*(num|n)_\w*heads?|\w*attention_heads|n_heads?|num_heads", HEADS),
    (r"\w*head_dim|d_kv|kv_channels|d_head|attention_head_size|\w*attention_head_dim", HIDDEN // HEADS),
    (r"\w*(num|n)_\w*layers?|\w*_layers|n_layers?|depth|\w*num_blocks", LAYERS),
    (r"\w*hidden_size|d_model|\w*embed_dim|n_embd|\w*embedding_size|dim|hidden_dim|model_dim|embd_dim", HIDDEN),
    (r"word_embed_proj_dim|projection_dim|output_dim|\w*_proj_dim|projector_hidden_size|out_hidden_size", HIDDEN),
    (r"image_size|input_size|crop_size", IMAGE),
    (r"patch_size", PATCH),
    (r"(num_|n_)?(routed_|local_)*experts|num_local_experts|n_routed_experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok|moe_k|top_k_experts|moe_topk", 2),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_source_positions|max_target_positions", POSITIONS),
)  # fmt: skip
"""What integers of these names become, if they are larger: a name is looked up from the top."""

COUNTS = re.compile(r"depths?|\w*(num|n)_?\w*layers?|\w*_layers|\w*num_blocks|\w*block_repeats")
"""Names of lists that hold one number of layers a stage."""

TOKEN = re.compile(r"\w*token_(id|index|ids)|\w*_token")
KEPT = {
    "small": "(?!)",
    "two heads": r"head_dim|d_kv|groups|projection_dim",
    "narrow": r"head_dim|heads|d_kv|experts|groups",
    "few layers": r"^(?!.*(vocab|layers?$|^depth$|blocks$))",
}
"""Degrees of making a config small, with the names that keep their values: none to all but depth and vocabulary."""


def configs(config_class: type) -> Iterator[tuple[str, Any]]:
    """Configs to try, with what was done to each: the smallest first."""
    default = config_class()
    for name, kept in KEPT.items():
        try:
            yield name, config_class.from_dict(_shrunk(default.to_dict(), re.compile(kept), name == "two heads"))
        except Exception:
            continue
    yield "default", default


def _shrunk(values: dict[str, Any], kept: re.Pattern[str], two_heads: bool) -> dict[str, Any]:
    """The same settings with smaller sizes, those of nested configs included."""
    head = _head(values) if two_heads else 0
    before = {value for name, value in values.items() if isinstance(value, int) and _rule(name) == LAYERS}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            changed[name] = _shrunk(value, kept, two_heads)
        elif isinstance(value, list) and len(value) in before and len(value) > LAYERS:  # one entry a layer
            changed[name] = value[:LAYERS]
        elif isinstance(value, list) and value and COUNTS.fullmatch(name) and all(type(v) is int for v in value):
            changed[name] = [min(v, 1) for v in value]
        elif TOKEN.fullmatch(name) and isinstance(value, int) and value >= VOCABULARY:
            changed[name] = 100 + sum(name.encode()) % 28
        elif type(value) is int and not kept.search(name):
            size = _rule(name, value)
            if head and size in (HEADS, HIDDEN):
                size = 2 * head if size == HIDDEN else 2
            changed[name] = min(value, size)
        else:
            changed[name] = value
    return changed


def _head(values: dict[str, Any]) -> int:
    """How wide one attention head is; 0 where the names do not tell."""
    whole = {_rule(name): value for name, value in reversed(values.items()) if type(value) is int and value}
    if HIDDEN in whole and HEADS in whole:
        return whole[HIDDEN] // whole[HEADS]
    return 0


def _rule(name: str, otherwise: int = -1) -> int:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), otherwise)


def build(model_class: Any, config_class: type) -> Iterator[tuple[str, nn.Module]]:
    """Models to try, smallest first, in evaluation mode, their linear layers large enough to matter.

    Raises:
        Exception: what the last of the configs raised, if none could be built.
    """
    last: Exception | None = None
    built = False
    for how, config in configs(config_class):
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(_copy(config)).parameters())
        except Exception:  # it computes with its parameters while it is built
            size = 0 if how in ("small", "narrow") else LARGEST + 1
        try:
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} M parameters, and no rule makes them fewer")
            torch.manual_seed(0)
            model = model_class(_copy(config)).eval()
        except Exception as error:
            last = last or error
            continue
        built = True
        yield how, _randomised(model)
    if not built:
        assert last is not None
        raise last


def _copy(config: Any) -> Any:
    """A config of its own: models write into theirs."""
    return type(config).from_dict(config.to_dict())


@torch.no_grad()
def _randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and isinstance(weight, Tensor) and weight.dim() == 2:
            weight.normal_(std=module.weight.shape[1] ** -0.5)
    return model


# --- inputs -----------------------------------------------------------------------------------------------------------


def requests(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, by the arguments that the model's ``forward`` takes: the plainest first."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    made = {name: values for name in parameters if (values := _values(name, model.config))}
    first = [name for name in (main, "input_ids", "pixel_values", "input_features", "input_values") if name in made]
    beside = [name for name in ("decoder_input_ids", "decoder_input_values", "bbox", "query_embeds") if name in made]
    media = [name for name in ("pixel_values", "input_features", "input_values") if name in made]
    seen: list[tuple[str, ...]] = []
    for name in dict.fromkeys(first or beside):
        for more in ([], beside, [n for n in media if n != name], [n for n in (*media, *beside) if n != name], [*made]):
            names = tuple(dict.fromkeys((name, *more)))
            if names in seen:
                continue
            seen.append(names)
            for variant in range(max(len(made[n]) for n in names)):
                yield {n: made[n][min(variant, len(made[n]) - 1)] for n in names}


def _find(config: Any, *names: str, otherwise: int) -> int:
    """The first of these settings that the config or one nested in it has."""
    nested = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    for holder in (config, *nested):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, list | tuple) and value and isinstance(value[0], int):
                return value[0]
    return otherwise


def _values(name: str, config: Any) -> list[Tensor]:
    """What an argument of this name can be given, two rows: several shapes where the name does not tell which."""
    generator = torch.Generator().manual_seed(len(name))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if name in ("input_ids", "decoder_input_ids"):
        # Decoders of several codes a token take a row for each code.
        coded = name == "decoder_input_ids" or not getattr(config, "is_encoder_decoder", False)
        codes = _find(config, "num_codebooks", otherwise=0) if coded else 0
        return [torch.randint(3, 99, (rows, 12), generator=generator) for rows in (2, 2 * codes) if rows]
    if name == "query_embeds":
        return [noise(2, 4, _find(config, "hidden_size", otherwise=HIDDEN))]
    if name == "bbox":
        return [torch.tensor([1, 2, 3, 4]).expand(2, 12, 4)]
    if name == "pixel_values":
        side, channels = _find(config, "image_size", otherwise=IMAGE), _find(config, "num_channels", otherwise=3)
        frames = _find(config, "num_frames", "frames_per_clip", otherwise=2)
        return [noise(2, channels, side, side), noise(2, channels, 64, 64), noise(2, frames, channels, side, side)]
    if name == "pixel_values_videos":
        side, frames = (
            _find(config, "image_size", "crop_size", otherwise=IMAGE),
            _find(config, "frames_per_clip", otherwise=2),
        )
        return [noise(2, frames, 3, side, side)]
    if name == "input_features":
        bins = _find(config, "num_mel_bins", "feature_size", "input_dim", otherwise=80)
        length = 2 * _find(config, "max_source_positions", otherwise=32)
        return [noise(2, bins, length), noise(2, length, bins), noise(2, 1, 1001, 64)]
    if name in ("input_values", "decoder_input_values"):
        bins = _find(config, "num_mel_bins", otherwise=80)
        return [noise(2, 4000), noise(2, 1, 4000), noise(2, _find(config, "max_length", otherwise=64), bins)]
    return []
