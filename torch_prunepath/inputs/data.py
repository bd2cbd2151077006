"""Calibration and evaluation data: turning texts, token ids and batches into model inputs, or letting the model write.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.inputs.check import NOT_FINITE, check_ids, check_tokens, check_weights
from torch_prunepath.inputs.forms import read
from torch_prunepath.inputs.front import added_tokens, as_batch, front_of, quiet
from torch_prunepath.inputs.rows import count_rows, small_part, spread, take_rows
from torch_prunepath.inputs.text import Row, row_length, text_rows
from torch_prunepath.layer.hooks import eagerly
from torch_prunepath.progress import progress_bar

Inputs = dict[str, Any]

EVALUATION_ROWS = 8
"""Rows of one batch, where the caller gave rows or texts. A guess."""

OTHER_WIDTH = 256
"""Tokens that a row is taken for where it is no text: about those of an image. A guess."""


def as_inputs(calibration: Any, model: nn.Module, tokenizer: Any = None, tokens: int | None = None) -> Inputs:
    """Make one batch of model inputs from texts, chats, token ids, or batches of model inputs.

    Args:
        calibration: a text, a chat (dicts with ``role`` and ``content``), one row of token ids, token ids ``[B, T]``,
            or a dict of model inputs, such as a tokenizer returns; or an iterable of any of these, such as a list, a
            data loader, a data set of the ``datasets`` package, or a generator. Ids may be tensors, arrays or lists,
            and rows may differ in length: they are padded and joined. Columns that the model does not take are left
            out; a column of text, or of chats, is read with the tokenizer if there is one only. ``front_tokens`` in a
            dict tells how many tokens at the start of each row are context only and count in no statistic.
        model: the model that will receive them; its device and padding token are used.
        tokenizer: tokenizer for texts and chats; not needed for other data. Rows of text start with what it puts in
            front of every text, which counts in no statistic of a causal model. Ids are taken as they are.
        tokens: largest number of tokens to keep, in whole rows (at least one) that are evenly spread; None: all. No
            more elements than that are read: evenly spread, or the first ones of an iterable without a length.

    Returns:
        Keyword arguments for ``model``, on its device, and ``front_tokens`` where that is not 0.

    Raises:
        ValueError: if there is no data or no token in it, a tokenizer for texts is missing, batches do not fit
            together, an id is outside the model's vocabulary, or a decoder needs inputs of its own.
        TypeError: if the data is of another type.
    """
    found = read(calibration, model, tokenizer, tokens)
    return _joined(_as_batches(found, model, tokenizer), model, tokenizer, tokens)


def _as_batches(found: list[str] | list[Inputs], model: nn.Module, tokenizer: Any) -> list[Inputs]:
    """Tokenise what is text."""
    texts = [text for text in found if isinstance(text, str)]
    if texts:
        return list(text_rows(texts, tokenizer, row_length(model), causal=is_causal(model)))
    return [batch for batch in found if not isinstance(batch, str)]


def _joined(batches: list[Inputs], model: nn.Module, tokenizer: Any = None, tokens: int | None = None) -> Inputs:
    inputs = _join(batches, _padding_id(model))
    ids = inputs.get("input_ids")
    check_tokens(inputs)
    if ids is not None:
        check_ids(ids, model, tokenizer)
    inputs = _with_decoder_ids(inputs, model)
    if ids is not None and tokens is not None and ids.dim() == 2 and ids.numel() > tokens:
        rows, count = max(1, tokens // ids.shape[1]), count_rows(inputs)
        if count is not None and rows < count:
            inputs = take_rows(inputs, spread(count, rows, rows_together(inputs, model)))
    device = next(model.parameters()).device
    return {key: _ordinary(value.to(device)) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _with_decoder_ids(inputs: Inputs, model: nn.Module) -> Inputs:
    """Give token ids to the decoder of an encoder-decoder as well, if the model runs with them there.

    Some decoders take several codes for each token, and make their first ones themselves.

    Raises:
        ValueError: if the model runs neither with the ids there nor without.
    """
    told = inputs.keys() & {"decoder_input_ids", "labels"}
    if not _is_encoder_decoder(model) or "input_ids" not in inputs or told:
        return inputs
    copied = {**inputs, "decoder_input_ids": inputs["input_ids"]}
    with_ids = _failure(model, small_part(copied)) and _failure(model, copied)
    if with_ids is None:
        return copied
    without = _failure(model, small_part(inputs)) and _failure(model, inputs)
    if without is None:
        return inputs
    raise ValueError(
        f"the model runs neither with input_ids as its decoder_input_ids ({type(with_ids).__name__}: {with_ids}) nor "
        f"without decoder_input_ids ({type(without).__name__}: {without}): pass decoder_input_ids beside input_ids, in "
        "the shape that its decoder takes"
    ) from with_ids


def rows_together(inputs: Inputs, model: nn.Module) -> int:
    """How many rows the model takes at the least: 1, or more where several rows hold one text, one for each code.

    It is 1 too where the model runs on no part of the inputs: it tells why when it is run.
    """
    rows = count_rows(inputs) or 1
    sizes = (size for size in range(1, rows + 1) if rows % size == 0)
    return next((size for size in sizes if _failure(model, small_part(inputs, size)) is None), 1)


def single_rows(inputs: Inputs, model: nn.Module, tokens: int) -> list[Inputs]:
    """Rows one by one, evenly spread, with at most ``tokens`` tokens in all (at least one row).

    What cannot be cut into rows is taken as it is, and rows that belong together stay so.
    """
    rows = count_rows(inputs)
    if rows is None:
        return [inputs]
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else OTHER_WIDTH
    together = rows_together(inputs, model)
    chosen = spread(rows, min(rows, tokens // width), together)[::together].tolist()
    return [take_rows(inputs, slice(i, i + together)) for i in chosen]


def _failure(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What the model raises when it is run in evaluation mode; the random state is left as it was."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model), eagerly():
        try:
            model(**quiet(model, inputs))
        except Exception as error:
            return error
    return None


def _ordinary(value: Tensor) -> Tensor:
    """The same numbers outside of ``torch.inference_mode``: autograd cannot save tensors that were made inside it."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def _join(batches: list[Inputs], padding_id: int) -> Inputs:
    if len({frozenset(batch) for batch in batches}) > 1:
        raise ValueError("calibration batches have different keys: give every batch the same model inputs")
    if len({b["input_ids"].shape[1] for b in batches if "input_ids" in b}) > 1:
        for batch in batches:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    joined: Inputs = {}
    front_of(batches)
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


def can_sample(model: nn.Module) -> bool:
    """Whether :func:`sample_text` can use the model: a causal language model that generates from token ids alone."""
    can_generate = getattr(model, "can_generate", None)
    return bool(
        can_generate is not None
        and can_generate()
        and not _is_encoder_decoder(model)
        and getattr(model, "main_input_name", "input_ids") == "input_ids"
    )


def is_causal(model: nn.Module) -> bool:
    """Whether each token sees only those before it, as in every language model that writes from left to right."""
    # Attention says so itself, also in a model without a head.
    told = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return can_sample(model) or (told and not _is_encoder_decoder(model))


def sampling_start(model: Any, tokenizer: Any = None) -> list[int]:
    """Return the token ids from which a causal language model begins to write; none if nothing names any.

    They are what its tokenizer puts in front of every text; else its config's beginning of a sequence, or the end.
    """
    front = [] if tokenizer is None else list(added_tokens(tokenizer).front)
    config = model.config.get_text_config()
    return front or [i for i in (config.bos_token_id, config.eos_token_id) if isinstance(i, int)][:1]


def sampled_inputs(model: Any, tokens: int, seed: int = 0, progress: bool = True, tokenizer: Any = None) -> Inputs:
    """Let a causal language model write its own calibration text; what it starts from counts in no statistic.

    Raises:
        ValueError: as :func:`sample_text`.
    """
    ids = sample_text(model, tokens, seed, progress, tokenizer)
    return as_inputs(as_batch(ids, len(sampling_start(model, tokenizer))), model)


def sample_text(model: Any, tokens: int, seed: int = 0, progress: bool = True, tokenizer: Any = None) -> Tensor:
    """Let a causal language model write its own calibration text: ids ``[B, T]`` sampled at temperature 1.

    Every row starts with :func:`sampling_start`, or with an id by chance. The global random state is left as it was.

    Raises:
        ValueError: if :func:`can_sample` is false for the model, or its logits are not finite.
    """
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    if not can_sample(model):
        raise ValueError("the model cannot write its own calibration text: pass calibration=")
    start = sampling_start(model, tokenizer)
    places = max(1, len(start))
    length = max(places + 1, min(row_length(model), tokens))
    rows = max(1, tokens // length)
    device = next(model.parameters()).device
    config = model.config.get_text_config()

    class Tick(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            bar.update(rows)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    new = length - places
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        evaluating(model),
        progress_bar(total=rows * new, desc="sampling calibration text", unit="tok", progress=progress) as bar,
    ):
        torch.manual_seed(seed)
        if start:
            first = torch.tensor(start, device=device).repeat(rows, 1)
        else:
            first = torch.randint(config.vocab_size, (rows, 1), device=device)
        generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=_padding_id(model),
            eos_token_id=config.eos_token_id,
        )
        with _finite_logits(model):
            ids: Tensor = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                generation_config=generation,
                stopping_criteria=StoppingCriteriaList([Tick()]),
            )
    return ids


@contextlib.contextmanager
def _finite_logits(model: nn.Module) -> Iterator[None]:
    """Say what is wrong where torch refuses to draw from the model's probabilities."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        check_weights(model)
        raise ValueError(NOT_FINITE + "it cannot write its own calibration text: load it in float32") from error


def iterate_inputs(batches: Any, model: nn.Module, tokenizer: Any = None) -> list[Inputs]:
    """Turn data into batches for evaluation, each as keyword arguments for the model on its device.

    It takes the same data as :func:`as_inputs`. Texts and single rows are joined, ``EVALUATION_ROWS`` to a batch.
    """
    found = _as_batches(read(batches, model, tokenizer), model, tokenizer)
    return [_joined(group, model, tokenizer) for group in _grouped(found)]


def _grouped(batches: Sequence[Inputs]) -> Iterator[list[Inputs]]:
    """Group neighbouring rows, ``EVALUATION_ROWS`` to a group; a batch of the caller's is a group by itself."""
    for joined, group in itertools.groupby(batches, key=lambda batch: isinstance(batch, Row)):
        members = list(group)
        size = EVALUATION_ROWS if joined else 1
        yield from (members[start : start + size] for start in range(0, len(members), size))


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
