"""Model, texts and calibration data, each loaded or tokenised once and kept in the results' cache."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adaptation.options import VALID, Settings
from benchmarks.common.store import Store, digest
from benchmarks.quality import read_text
from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation.models import load_model, longest_context
from torch_prunepath.train.batches import Batches

CHUNK = 1 << 16
"""Characters that are tokenised together, about: chunks are tokenised side by side."""


class Material:
    """Everything that runs share.

    Args:
        settings: what was asked.

    Raises:
        UserError: if the model or a text cannot be had or is too short.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.store = settings, Store(settings.output)
        self.cache = self.store.cache
        self._dense, self.tokenizer = self._load()
        budget, context = settings.budget, settings.budget.context
        if context > longest_context(self._dense):
            raise UserError(f"--context {context} is longer than the model's {longest_context(self._dense)}")
        all_NC = self._windows(settings.train_text)
        count = min(settings.windows, len(all_NC) // 10)
        usable = len(all_NC) - count - (len(all_NC) - count) % budget.rows
        if count < 1 or usable < budget.rows:
            raise UserError(
                f"{settings.train_text} has {all_NC.numel()} tokens: give a longer text, or smaller batches"
            )
        self.train_NC = all_NC[:usable]
        self.texts = {name: self._first(path) for name, path in settings.test_texts.items()}
        self.texts |= {VALID: all_NC[-count:]}
        rows = max(1, settings.calibration_tokens // context)
        self.calibration_NC = spread(self.train_NC, rows)
        shown = {"train": self.train_NC, "calibration": self.calibration_NC, **self.texts}
        self.fingerprints = {name: fingerprint(window_NC) for name, window_NC in shown.items()}

    def dense(self) -> Any:
        """A copy of the dense model, in float32 on the device, in evaluation mode."""
        return copy.deepcopy(self._dense).to(self.settings.device)

    @functools.cached_property
    def teacher(self) -> Any:
        """The dense model, frozen."""
        return self.dense().requires_grad_(False)

    def batches(self, seed: int, accumulation: int) -> Batches:
        """The training windows in the order that the seed decides, in batches of which a step takes this many.

        Raises:
            UserError: if steps would differ in size.
        """
        return Batches(self.train_NC, self.settings.budget.rows_of(accumulation), seed)

    def converted(self, method: str, how: Mapping[str, Any], convert: Callable[[Any], Any]) -> tuple[Any, bool]:
        """A copy of the dense model as ``convert`` changes it in place, on the device; and whether it was kept."""

        def make() -> Any:
            model = self.dense()
            convert(model)
            return model

        calibration = self.fingerprints["calibration"]
        key = {"model": self.model_key(), "method": method, "how": dict(how), "calibration": calibration}
        model, kept = self.cache.get(method, key, make)
        return model.to(self.settings.device), kept

    def _load(self) -> tuple[Any, Any]:
        name = self.settings.model
        if not name.endswith(".gguf"):  # those take long to load
            model, tokenizer = load_model(name)
            return model.float(), tokenizer
        found, _ = self.cache.get("model", self.model_key(), lambda: load_model(name))
        return found[0].float(), found[1]

    def model_key(self) -> list[Any]:
        """Differs where the model's files do."""
        path = Path(self.settings.model)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        return [path.name, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]

    def _windows(self, path: Path) -> Tensor:
        """Every window of a text, int64 ``[N, C]``."""
        # Not the model's files, so that token ids made on another machine serve as well.
        about = [hashlib.sha256(path.read_bytes()).hexdigest(), digest(self.tokenizer.get_vocab())]
        ids, _ = self.cache.get("tokens", about, lambda: tokenise(read_text(path), self.tokenizer))
        context = self.settings.budget.context
        if len(ids) < context:
            raise UserError(f"{path} has {len(ids)} tokens, fewer than one window of {context}: give a longer text")
        return ids[: len(ids) - len(ids) % context].to(torch.int64).view(-1, context)

    def _first(self, path: Path) -> Tensor:
        return spread(self._windows(path), self.settings.windows)


def tokenise(text: str, tokenizer: Any) -> Tensor:
    """Token ids of a text, uint16 (or int32, for large vocabularies) ``[tokens]``; cut into chunks at line ends."""
    chunks, start = [], 0
    while start < len(text):
        end = text.find("\n", start + CHUNK)
        end = len(text) if end < 0 else end + 1
        chunks.append(text[start:end])
        start = end
    ids = tokenizer(chunks, add_special_tokens=False, verbose=False)["input_ids"] if chunks else []
    ids_T = torch.cat([torch.tensor(part, dtype=torch.int32) for part in ids] or [torch.empty(0, dtype=torch.int32)])
    return ids_T.to(torch.uint16) if len(tokenizer) <= 1 << 16 else ids_T


def spread(window_NC: Tensor, count: int) -> Tensor:
    """At most ``count`` windows, evenly spread."""
    chosen_N = torch.linspace(0, len(window_NC) - 1, min(count, len(window_NC))).round().long()
    return window_NC[chosen_N]


def fingerprint(window_NC: Tensor) -> str:
    """Differs where the windows do."""
    return hashlib.sha256(window_NC.contiguous().numpy().tobytes()).hexdigest()[:10]
