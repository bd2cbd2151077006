"""What the caller's data is: texts, chats, rows and batches, in the forms that data sets, tokenizers and loaders give.

Elements are looked at one by one, whatever holds them. Nothing here knows the model but by the names that its forward
takes.

Shapes: B rows, T tokens a row.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_prunepath.inputs.front import FRONT
from torch_prunepath.inputs.text import Row, chat_text, is_chat

logger = logging.getLogger(__name__)
Batch = dict[str, Any]

CHATS = ("messages", "conversation", "conversations")
"""Columns that hold chats in the data sets that trainers of chat models take."""

FORMS = "calibration must hold texts, int64 token ids [B, T] or dicts of model inputs, not "


def read(data: Any, model: nn.Module, tokenizer: Any = None, most: int | None = None) -> list[str] | list[Batch]:
    """Tell what data is, and make of it either texts or batches of tensors; chats become texts.

    Args:
        data: see :func:`torch_prunepath.inputs.data.as_inputs`.
        model: the model that will receive it: columns that its forward does not name are left out.
        tokenizer: what texts will be read with, and chats are written with.
        most: largest number of elements to read: evenly spread, or the first, of what has no length; None reads all.

    Returns:
        Texts; or batches, whose tensors have the rows as first dimension and whose token ids are int64 ``[B, T]``.

    Raises:
        ValueError: if there is no data, a tokenizer is missing, or texts are mixed with other things.
        TypeError: if the data is of another type.
    """
    elements = _elements(data, most)
    if not elements:
        raise ValueError("calibration is empty: pass texts, token batches, or None")
    taken = _Columns(model)
    # What a data set of the datasets package yields are single rows, whatever is in them.
    rows = hasattr(data, "column_names")
    found = [_parts(element, taken, rows) for element in elements]
    texts = list(itertools.chain.from_iterable(part for part in found if isinstance(part, _Texts)))
    batches = list(itertools.chain.from_iterable(part for part in found if not isinstance(part, _Texts)))
    taken.tell()
    if any(isinstance(part, _Texts) for part in found):
        if not all(isinstance(part, _Texts) for part in found):
            raise ValueError("calibration mixes texts with other things: pass only texts, or only batches")
        if tokenizer is None:
            column = next((part.column for part in found if isinstance(part, _Texts) and part.column), None)
            where = "" if column is None else f" in its column {column!r}"
            raise ValueError(f"calibration holds texts{where}: pass tokenizer= as well, or token ids")
        return [text if isinstance(text, str) else chat_text(text, tokenizer) for text in texts]
    if not batches:
        raise ValueError("calibration holds no token: its rows are empty")
    return [batch for batch in batches if _has_tokens(batch)] or batches  # which are refused for that


def _has_tokens(batch: Batch) -> bool:
    """Whether a batch has a token that is no padding, or does not hold tokens at all."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    return ids is None or (ids.numel() > 0 and (not isinstance(mask, Tensor) or bool(mask.any())))


# --- elements ---------------------------------------------------------------------------------------------------------


def _elements(data: Any, most: int | None) -> list[Any]:
    """List what the data holds: texts, chats, rows of ids, or batches."""
    if isinstance(data, str | Tensor | np.ndarray | Mapping) or is_chat(data) or _is_numbers(data):
        return [data]
    try:
        iterator = iter(data)
    except TypeError:
        return [data]  # refused by type, like any other thing that is no batch
    if most is None:
        return list(iterator)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and len(data) > most:
        return [data[int(i)] for i in torch.linspace(0, len(data) - 1, most).round()]
    return list(itertools.islice(iterator, most))


def _is_numbers(value: Any) -> bool:
    """Whether this is a list of numbers, one row."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(number, int | float | np.number) and not isinstance(number, bool) for number in value)
    )


class _Texts(list[Any]):
    """Texts, or chats, and the column in which they were, if they were in one."""

    column: str | None = None


def _parts(element: Any, taken: _Columns, row: bool) -> _Texts | list[Batch]:
    """Return the texts of an element, or its batches."""
    if isinstance(element, Mapping):
        return _of_mapping(element, taken, row)
    texts = _texts_in(CHATS[0], element)
    if texts:
        return _Texts(texts)
    if isinstance(element, Sequence) and len(element) == 1 and isinstance(element[0], Tensor):
        element = element[0]  # a batch of TensorDataset
    ids = _as_tensor(element)
    if isinstance(ids, list) and all(_is_ids(row) and row.dim() == 1 for row in ids):
        return [Row(input_ids=row.long()[None]) for row in ids]
    if not isinstance(ids, Tensor) or not _is_ids(ids):
        raise TypeError(FORMS + _kind(ids if isinstance(ids, Tensor) else element))
    return [{"input_ids": ids.long()} if ids.dim() == 2 else Row(input_ids=ids.long()[None])]


def _is_ids(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.dim() in (1, 2)
        and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, list | tuple) and value:
        return f"{type(value).__name__} of {type(value[0]).__name__}"
    return type(value).__name__


def _as_tensor(value: Any) -> Any:
    """Make a tensor of an array or of nested lists of numbers, or a list of tensors where lengths differ."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else value
    if _is_numbers(value):
        return torch.tensor(value)
    if isinstance(value, list | tuple) and value:
        parts = [_as_tensor(part) for part in value]
        if all(isinstance(part, Tensor) for part in parts):
            # An empty list has no numbers by which to know it, but its neighbours tell.
            return torch.stack(parts) if len({part.shape for part in parts}) == 1 else parts
        if all(isinstance(part, Tensor) or (isinstance(part, list | tuple) and not part) for part in parts):
            return [part if isinstance(part, Tensor) else torch.empty(0, dtype=torch.int64) for part in parts]
    return value


# --- dicts ------------------------------------------------------------------------------------------------------------


class _Columns:
    """Which columns of the data the model's forward takes, and which were left out."""

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self.names = set(parameters)
        self._any = inspect.Parameter.VAR_KEYWORD in kinds
        self._model = type(model).__name__
        self._left: dict[str, None] = {}

    def chosen(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that forward takes. ``labels`` are for models that make a decoder's inputs of them.

        Raises:
            ValueError: if it takes none of them.
        """
        kept = {}
        for name, value in columns.items():
            loss_only = name == "labels" and "decoder_input_ids" not in self.names
            # A setting such as use_cache=False or a missing mask is no column.
            if name == FRONT or value is None or isinstance(value, bool) or (name in self.names and not loss_only):
                kept[name] = value
        if any(name in self.names for name in kept):
            self._left |= dict.fromkeys(name for name in columns if name not in kept and name != "labels")
            return kept
        if self._any:
            return {name: value for name, value in columns.items() if not _texts_in(name, value)}
        raise ValueError(
            f"calibration holds {', '.join(map(repr, columns))}, none of which {self._model} takes: name the inputs as "
            f"its forward does ({', '.join(self.names)})"
        )

    def tell(self) -> None:
        """Say which columns were left out."""
        if self._left:
            logger.warning("calibration: left out %s, which %s does not take", ", ".join(self._left), self._model)


def _of_mapping(columns: Mapping[str, Any], taken: _Columns, row: bool) -> _Texts | list[Batch]:
    if not columns:
        raise ValueError("calibration holds an empty dict: pass the model's inputs by name, as {'input_ids': ids}")
    _refuse_splits(columns)
    if not any((name in taken.names and name != "labels") or name.endswith("input_ids") for name in columns):
        texts = _text_column(columns)
        if texts is not None:
            return texts
    chosen = taken.chosen(columns)
    return _batches({name: _as_tensor(value) for name, value in chosen.items()}, row)


def _refuse_splits(columns: Mapping[str, Any]) -> None:
    if all(hasattr(value, "column_names") for value in columns.values()):
        first = next(iter(columns))
        raise ValueError(
            f"calibration holds a data set for each of {', '.join(columns)}: pass one, such as data[{first!r}]"
        )


def _text_column(columns: Mapping[str, Any]) -> _Texts | None:
    """Return the texts or chats of a row, or of a batch of rows; None if no column holds any.

    Raises:
        ValueError: if several columns hold texts.
    """
    found = {name: texts for name, value in columns.items() if (texts := _texts_in(name, value))}
    chats = {name: texts for name, texts in found.items() if not isinstance(texts[0], str)}
    found = chats or found
    if len(found) > 1:
        first = next(iter(found))
        raise ValueError(
            f"calibration has several columns of text, {', '.join(map(repr, found))}: pass one with tokenizer=, such "
            f"as data[{first!r}]"
        )
    for name, value in found.items():
        texts = _Texts(value)
        texts.column = name
        return texts
    return None


def _texts_in(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or (name in CHATS and is_chat(value)):
        return [value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "UO":
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        return []
    texts = all(isinstance(text, str) for text in value) or (name in CHATS and all(map(is_chat, value)))
    return list(value) if texts else []


def _batches(columns: Batch, row: bool) -> list[Batch]:
    """Make batches of the columns of one row, or of several rows, which may differ in length."""
    ids = columns.get("input_ids")
    if isinstance(ids, list) and not ids:
        ids = columns["input_ids"] = torch.empty(0, dtype=torch.int64)
    if isinstance(ids, list):
        return [part for each in _rows(columns, len(ids)) for part in _batches(each, row=True)]
    if ids is not None and not _is_ids(ids):
        raise TypeError(f"calibration's 'input_ids' must be int64 token ids [B, T], not {_kind(ids)}")
    single = ids.dim() == 1 if isinstance(ids, Tensor) else row
    if single:
        columns = {name: _as_row(name, value) for name, value in columns.items()}
    wrong = {name: value for name, value in columns.items() if isinstance(value, list | tuple | str | np.ndarray)}
    for name, value in wrong.items():
        raise TypeError(f"calibration's {name!r} must be a tensor, an array or lists of numbers, not {_kind(value)}")
    columns = {name: _int64(name, value) for name, value in columns.items()}
    return [Row(columns) if single else columns]


def _rows(columns: Batch, count: int) -> Iterator[Batch]:
    for name, value in columns.items():
        if _is_column(value) and len(value) != count:
            raise ValueError(
                f"calibration's 'input_ids' have {count} rows and {name!r} has {len(value)}: give it as many"
            )
    for i in range(count):
        yield {name: value[i] if _is_column(value) else value for name, value in columns.items()}


def _is_column(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)


def _as_row(name: str, value: Any) -> Any:
    """Give what belongs to one row a first dimension."""
    if isinstance(value, int | float) and not isinstance(value, bool) and name != FRONT:
        value = torch.tensor(value)
    if isinstance(value, list) and not value:
        value = torch.empty(0, dtype=torch.int64)
    return value[None] if isinstance(value, Tensor) else value


def _int64(name: str, value: Any) -> Any:
    return value.long() if name.endswith("input_ids") and isinstance(value, Tensor) else value
