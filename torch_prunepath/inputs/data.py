"""Calibration and evaluation data: turning texts, token ids and batches into model inputs, or letting the model write.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.progress import progress_bar

Inputs = dict[str, Any]
ROW_TOKENS = 512
"""Tokens in a row of calibration text, where the model allows as many. Chosen without measurement: docs/log.md,
"choosing the training-free defaults on SmolLM2-135M", leaves open whether longer rows are better."""


def as_inputs(calibration: Any, model: nn.Module, tokenizer: Any = None, tokens: int | None = None) -> Inputs:
    """Make one batch of model inputs from texts, token ids or batches.

    Args:
        calibration: a list of texts (with ``tokenizer``); or token ids, int64 ``[B, T]`` or ``[T]``; or a dict of model
            inputs; or an iterable of such ids or dicts, which are padded to one length and joined.
        model: the model that will receive them; its device and padding token are used.
        tokenizer: tokenizer for texts; not needed for other data.
        tokens: largest number of tokens to keep, in whole rows (at least one) that are evenly spread; None: all.

    Returns:
        Keyword arguments for ``model``, on its device.

    Raises:
        ValueError: if there is no data, a tokenizer for texts is missing, or batches do not fit together.
        TypeError: if the data is of another type.
    """
    batches: list[Any] = [calibration] if isinstance(calibration, Tensor | Mapping | str) else _listed(calibration)
    if not batches:
        raise ValueError("calibration is empty: pass texts, token batches, or None")
    if any(isinstance(batch, str) for batch in batches):
        if not all(isinstance(batch, str) for batch in batches):
            raise ValueError("calibration mixes texts with other things: pass only texts, or only batches")
        batches = _tokenize(batches, model, tokenizer)
    inputs = _join([_as_mapping(batch) for batch in batches], _padding_id(model))
    ids = inputs.get("input_ids")
    if ids is not None and tokens is not None and ids.dim() == 2 and ids.numel() > tokens:
        rows = max(1, tokens // ids.shape[1])
        if rows < ids.shape[0]:
            keep = torch.linspace(0, ids.shape[0] - 1, rows).round().long()
            B = ids.shape[0]
            inputs = {k: v[keep] if isinstance(v, Tensor) and v.shape[:1] == (B,) else v for k, v in inputs.items()}
    if _is_encoder_decoder(model) and ids is not None and not inputs.keys() & {"decoder_input_ids", "labels"}:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    device = next(model.parameters()).device
    return {key: _ordinary(value.to(device)) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _ordinary(value: Tensor) -> Tensor:
    """The same numbers outside of ``torch.inference_mode``: autograd cannot save tensors that were made inside it."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def _listed(calibration: Any) -> list[Any]:
    try:
        return list(calibration)
    except TypeError:
        return [calibration]  # refused by type, like any other thing that is no batch


def _as_mapping(batch: Any) -> Inputs:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, Sequence) and batch and all(isinstance(i, int) for i in batch):
        batch = torch.tensor(batch)
    if isinstance(batch, Tensor) and not batch.is_floating_point() and batch.dim() in (1, 2) and batch.numel():
        return {"input_ids": batch if batch.dim() == 2 else batch.unsqueeze(0)}
    raise TypeError(
        "calibration must hold texts, int64 token ids [B, T] or dicts of model inputs, not "
        + (f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__)
    )


def _join(batches: list[Inputs], padding_id: int) -> Inputs:
    if len({frozenset(batch) for batch in batches}) > 1:
        raise ValueError("calibration batches have different keys: give every batch the same model inputs")
    if len({b["input_ids"].shape[1] for b in batches if "input_ids" in b}) > 1:
        for batch in batches:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    joined: Inputs = {}
    for key, first in batches[0].items():
        values = [batch[key] for batch in batches]
        if not isinstance(first, Tensor):
            joined[key] = first
            continue
        fill = padding_id if key.endswith("input_ids") else -100 if key == "labels" else 0
        if first.dim() == 2 and not first.is_floating_point():
            width = max(value.shape[1] for value in values)
            values = [nn.functional.pad(value, (0, width - value.shape[1]), value=fill) for value in values]
        if len({tuple(value.shape[1:]) for value in values}) > 1:
            raise ValueError(
                f"calibration batches differ in the shape of {key!r}: give all of them one shape, batch size apart"
            )
        joined[key] = torch.cat(values)
    return joined


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _padding_id(model: nn.Module) -> int:
    value = getattr(_config(model), "pad_token_id", None)
    return value if isinstance(value, int) and value >= 0 else 0


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(_config(model), "is_encoder_decoder", False))


def row_length(model: nn.Module) -> int:
    """Return the tokens in a row of calibration text: ``ROW_TOKENS``, or fewer if the model has fewer positions."""
    config = _config(model)
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    # RoBERTa counts positions from its padding index + 1.
    return min([ROW_TOKENS, *(limit - 2 for limit in limits if isinstance(limit, int) and limit > 2)])


def _tokenize(texts: list[str], model: nn.Module, tokenizer: Any) -> list[Inputs]:
    if tokenizer is None:
        raise ValueError("calibration holds texts: pass tokenizer= as well, or token ids")
    length = row_length(model)
    rows = []
    for text in texts:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        rows += [ids[start : start + length] for start in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) >= min(8, length)] or [row for row in rows if row]
    if not rows:
        raise ValueError("calibration texts are empty after tokenisation: pass more text")
    return [{"input_ids": torch.tensor([row])} for row in rows]


def can_sample(model: nn.Module) -> bool:
    """Whether :func:`sample_text` can use the model: a causal language model that generates from token ids alone."""
    can_generate = getattr(model, "can_generate", None)
    return bool(
        can_generate is not None
        and can_generate()
        and not _is_encoder_decoder(model)
        and getattr(model, "main_input_name", "input_ids") == "input_ids"
    )


def sample_text(model: Any, tokens: int, seed: int = 0, progress: bool = True) -> Tensor:
    """Let a causal language model write its own calibration text: ids ``[B, T]`` sampled at temperature 1.

    The global random state is left as it was.

    Raises:
        ValueError: if :func:`can_sample` is false for the model.
    """
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    if not can_sample(model):
        raise ValueError("the model cannot write its own calibration text: pass calibration=")
    length = max(2, min(row_length(model), tokens))
    rows = max(1, tokens // length)
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    start = next((i for i in (config.bos_token_id, config.eos_token_id) if isinstance(i, int)), None)

    class Tick(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            bar.update(rows)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        evaluating(model),
        progress_bar(total=rows * (length - 1), desc="sampling calibration text", unit="tok", progress=progress) as bar,
    ):
        torch.manual_seed(seed)
        if start is None:
            first = torch.randint(config.vocab_size, (rows, 1), device=device)
        else:
            first = torch.full((rows, 1), start, device=device)
        generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=_padding_id(model),
            eos_token_id=config.eos_token_id,
        )
        ids: Tensor = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            generation_config=generation,
            stopping_criteria=StoppingCriteriaList([Tick()]),
        )
    return ids


def iterate_inputs(batches: Any, model: nn.Module, tokenizer: Any = None) -> list[Inputs]:
    """Turn data into batches for evaluation, each as keyword arguments for the model on its device.

    It takes the same data as :func:`as_inputs`. Texts become rows, eight to a batch (a guess).
    """
    if isinstance(batches, Tensor | Mapping | str):
        batches = [batches]
    batches = list(batches)
    if batches and all(isinstance(batch, str) for batch in batches):
        joined = as_inputs(batches, model, tokenizer)
        rows = joined["input_ids"].shape[0]
        return [{k: v[start : start + 8] for k, v in joined.items()} for start in range(0, rows, 8)]
    return [as_inputs(batch, model) for batch in batches]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode while the context is open, then restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Open :func:`evaluation_mode` and switch gradients off."""
    with evaluation_mode(model), torch.no_grad():
        yield
