"""Batches for training: turning the caller's batches into model inputs with labels, and counting tokens and labels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.inputs.data import Inputs, can_sample
from torch_prunepath.inputs.front import FRONT, as_batch

IGNORED = -100
"""The label of positions that no loss counts, as in torch's ``cross_entropy`` and in transformers."""


def as_dict(batch: Any) -> Inputs:
    """Copy a batch into a new dict.

    Raises:
        ValueError: if the batch is not a mapping.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a dict of model inputs, not {type(batch).__name__}: wrap it in a collator")
    return dict(batch)


def with_labels(batch: Any, causal: bool) -> Inputs:
    """Copy a batch into a dict that has labels.

    Where it has none, the labels of a causal language model are the tokens themselves, without padding and those in
    front of a text (``front_tokens``).

    Raises:
        ValueError: if the batch is not a mapping, or has no labels and the model is not a causal language model.
    """
    inputs = as_dict(batch)
    if inputs.get("labels") is None:
        if not causal or not isinstance(inputs.get("input_ids"), Tensor):
            raise ValueError("a batch has no 'labels': only a causal language model can take them from 'input_ids'")
        inputs["labels"] = inputs["input_ids"].clone()
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == inputs["labels"].shape:
            inputs["labels"].masked_fill_(mask == 0, IGNORED)
        inputs["labels"][:, : inputs.get(FRONT, 0)] = IGNORED
    return inputs


def on_device(batch: Inputs, device: torch.device) -> Inputs:
    """Copy the batch's tensors to the device; a copy to CUDA does not wait for work that is queued there."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    return {key: moved(value) for key, value in batch.items()}


def count_labels(batch: Inputs, causal: bool) -> Tensor:
    """Count the labels over which the model takes its mean loss: 0-d float32, on the batch's device."""
    labels: Tensor = batch["labels"]
    # A causal language model predicts each token from those before it: nothing predicts the first.
    counted = labels[:, 1:] if causal and labels.dim() == 2 else labels
    return (counted != IGNORED).sum().float()


def count_tokens(batch: Inputs) -> Tensor:
    """Count the tokens that are not padding, or the rows where the batch holds no tokens: 0-d float32.

    The count is on the device of the attention mask if there is one, otherwise on the CPU.
    """
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask != 0).sum().float()
    first = next((batch[key] for key in ("input_ids", "inputs_embeds") if isinstance(batch.get(key), Tensor)), None)
    if first is not None:
        return torch.tensor(float(first.shape[0] * first.shape[1]))
    return torch.tensor(float(next(v for v in batch.values() if isinstance(v, Tensor)).shape[0]))


def logit_weights(batch: Inputs, shape: tuple[int, ...]) -> Tensor | None:
    """Weight of each position of the logits, flattened float32: 1 if it counts, 0 if not. None if all count.

    Args:
        batch: the model inputs.
        shape: shape of the logits without the vocabulary.
    """
    for key in ("decoder_attention_mask", "attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and tuple(mask.shape) == shape:
            # An encoder's mask may have the decoder's shape by chance; its labels tell.
            if key == "attention_mask" and "decoder_input_ids" in batch:
                continue
            return mask.reshape(-1).float()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and tuple(labels.shape) == shape and len(shape) == 2 and "attention_mask" in batch:
        return (labels != IGNORED).reshape(-1).float()
    return None


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts each token of ``input_ids`` from the tokens before it."""
    return can_sample(model)


def endless(batches: Iterable[Any], skip: int) -> Iterator[Any]:
    """Repeat the batches without end, leaving out the first ``skip``.

    Raises:
        ValueError: if the batches end and cannot be iterated again.
    """
    seen = 0
    while True:
        before = seen
        for batch in batches:
            seen += 1
            if seen > skip:
                yield batch
        if seen == before:
            raise ValueError(
                f"the batches ended after {seen} and cannot be iterated again: pass a list or a data loader, or ask "
                "for fewer steps"
            )


def take(batches: Iterator[Any], number: int) -> list[Any]:
    """The next ``number`` batches."""
    return list(islice(batches, number))


class Batches:
    """Windows of tokens as batches of model inputs, in an order that depends on the seed and is the same in every pass.

    Args:
        window_NC: token ids, int64 ``[N, C]``: N windows of C tokens.
        rows: largest number of windows in a batch.
        seed: seed of the order.
        front: tokens at the start of each window that are context only: they are no labels and count in no statistic.
    """

    def __init__(self, window_NC: Tensor, rows: int, seed: int, front: int = 0) -> None:
        order_N = torch.randperm(len(window_NC), generator=torch.Generator().manual_seed(seed))
        self.rows, self._window_NC, self._front = rows, window_NC[order_N], front

    def __len__(self) -> int:
        return -(-len(self._window_NC) // self.rows)

    def __iter__(self) -> Iterator[Inputs]:
        for window_BC in self._window_NC.split(self.rows):
            yield as_batch(window_BC, self._front)

    def fingerprint(self) -> str:
        """Return a hash that differs when the batches differ."""
        found = hashlib.sha256(f"{self.rows} {tuple(self._window_NC.shape)}".encode())
        found.update(self._window_NC.contiguous().numpy().tobytes())
        return found.hexdigest()


class Later:
    """The same batches, starting later in their order, so that a stage goes on where the stage before it stopped.

    Args:
        batches: an iterable with a length, in the same order each time.
        skip: number of batches that came before.
    """

    def __init__(self, batches: Any, skip: int) -> None:
        self._batches, self._length = batches, len(batches)
        self._skip = skip % max(1, self._length)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        yield from itertools.islice(self._batches, self._skip, None)
        yield from itertools.islice(self._batches, self._skip)
