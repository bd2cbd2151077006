"""A model of lm-eval (lm-evaluation-harness): Hugging Face models made sparse, measured while they are evaluated.

Importing this module registers it; ``prunepath-eval``, and releases of lm-eval that look for entry points, do without.

Shapes: B rows, T tokens of one call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.budget import set_budget
from torch_prunepath.config import SparsifyConfig
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.discover import discover
from torch_prunepath.evaluation.corpus import load_corpus
from torch_prunepath.evaluation.lm_eval import NOT_INSTALLED, register
from torch_prunepath.evaluation.make_sparse import (
    Asked,
    fit_windows,
    holds_path,
    holds_sparse_layers,
    in_force,
    make_sparse,
    model_tau,
    reach_bytes,
    reach_sparsity,
)
from torch_prunepath.evaluation.models import refuse_file
from torch_prunepath.inputs.front import front_tokens
from torch_prunepath.layer import RoutedExperts, Routing
from torch_prunepath.layer.manifest import METHOD
from torch_prunepath.layer.sparse import Neurons
from torch_prunepath.layer.views import recording_neurons, sparse_layers, sparse_views
from torch_prunepath.shares import counted_neurons
from torch_prunepath.sparsity import Noted, SparsityRecord, set_tau

try:
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(NOT_INSTALLED, name=error.name) from error

# Below lm-eval's own, whose handler shows what is logged.
logger = logging.getLogger("lm_eval.models.prunepath")

HF_BACKENDS = ("default", "causal", "seq2seq")
"""Values of ``backend`` that are lm-eval's: the kind of model."""

ADAPTER = "adapter_config.json"


class PrunePathLM(HFLM):  # type: ignore[misc]
    """lm-eval's ``hf`` model with sparse feed-forward networks; reports the sparsity over the tokens it evaluated.

    A sparse checkpoint is taken as it is, ``tau``, ``sparsity`` or ``bytes`` set anew if given. A dense one is made
    sparse first, its adapter, if any, merged before. Nothing is trained or saved.

    Args:
        pretrained: a name, a folder, or a model, dense or sparse.
        tau: threshold in (0, 1].
        sparsity: in place of ``tau``: the sparsity in [0, 1) to reach on the calibration text.
        bytes: in place of both: the share of the FFNs' bytes in (0, 1] that a token reads, by tau and thresholds of
            each layer; see :func:`torch_prunepath.set_budget`. A sparse checkpoint that holds a path goes along it,
            unless there is a ``calibration_text``.
        calibration_text: a UTF-8 file to calibrate on; None for Python's help topics.
        backend: a backend of ``torch.compile`` for the model's forward, such as ``"prunepath"``; or, as in lm-eval,
            the kind of model: ``"default"``, ``"causal"`` or ``"seq2seq"``, which compiles nothing.
        measure: count inactive neurons and bytes read. It keeps each layer's steps apart; without it sparse layers run
            as one operator, and neither is reported.
        **options: fields of :class:`torch_prunepath.SparsifyConfig`, ``include`` and ``exclude`` (names or patterns of
            FFNs; a semicolon separates several), for making a dense model sparse; and everything that lm-eval's ``hf``
            model takes.

    Raises:
        UserError: if arguments are out of range or exclude each other, before anything is loaded; if the model cannot
            be made sparse.
    """

    _model: Any

    def __init__(
        self,
        pretrained: Any,
        tau: float | None = None,
        sparsity: float | None = None,
        calibration_text: str | None = None,
        backend: str = "default",
        measure: bool = True,
        bytes: float | None = None,
        **options: Any,
    ) -> None:
        self._ask = Asked.of(tau, sparsity, bytes, calibration_text, options)
        compiler = _compiler(backend)
        self._skipped: list[dict[str, str]] = []
        self._adapter = options.get("peft")
        if not isinstance(pretrained, str | Path):
            self._check_kind(holds_sparse_layers(pretrained))
        else:
            refuse_file(str(pretrained))
        pretrained = str(pretrained) if isinstance(pretrained, Path) else pretrained
        super().__init__(pretrained=pretrained, backend="default" if compiler else backend, **options)
        with as_user_error(ValueError, TypeError):
            self._calibration_tokens = self._make_as_asked(options.get("gguf_file") is not None)
        self._record = self._new_record() if measure else None
        self._noted: list[Noted] = []
        self._counted: dict[str, list[Tensor]] = {}
        self._watching = contextlib.ExitStack()  # as long as the model is here
        if measure:
            views = sparse_views(self._model)
            for name, layer in sparse_layers(self._model).items():
                self._counted[name] = []
                layer.register_routing_hook(functools.partial(self._note, name, layer))
                self._watching.enter_context(recording_neurons(layer, views[name], _NeuronNotes(self._counted[name])))
        self._scored: _Scored | None = None
        self._tokens = 0
        self._compiler = compiler
        if compiler is not None:
            inner = _hugging_face_model(self._model)
            inner.forward = torch.compile(inner.forward, backend=compiler, dynamic=True)

    # --- becoming sparse ----------------------------------------------------------------------------------------------

    def _get_config(self, pretrained: str, **options: Any) -> None:
        super()._get_config(pretrained, **options)
        if _is_sparse_config(self._config) or self._adapter is None:
            self._check_kind(_is_sparse_config(self._config))
        elif (Path(self._adapter) / ADAPTER).is_file():  # of one on the hub it is known once it is loaded
            self._check_kind(_holds_routers(Path(self._adapter) / ADAPTER))

    def _create_model(self, *arguments: Any, **options: Any) -> None:
        if options.get("peft"):
            import torch_prunepath.integrations.peft  # noqa: F401  (adapters that hold routers)
        super()._create_model(*arguments, **options)

    def _check_kind(self, sparse: bool) -> None:
        """Refuse what does not go with a sparse, or with a dense model."""
        if sparse and self._ask.about_experts:
            names = ", ".join(self._ask.about_experts)
            raise UserError(f"the model is sparse already, its experts made: leave out {names}")
        searches = self._ask.sparsity is not None or self._ask.bytes is not None
        if sparse and self._ask.text is not None and not searches:
            raise UserError("the model is sparse already: calibration_text is only for sparsity= and bytes=")
        if not sparse and self._ask.tau is None and not searches:
            raise UserError("the model is dense: give tau=, sparsity= or bytes= to make it sparse, or use --model hf")

    def _make_as_asked(self, from_gguf: bool) -> int:
        """Bring the loaded model to what was asked; return how many tokens that took."""
        ask, sparse = self._ask, holds_sparse_layers(self._model)
        self._check_kind(sparse)
        tokens = 0
        if not sparse:
            self._merge_adapter()
            if from_gguf and hasattr(self._model.config, "quantization_config"):
                del self._model.config.quantization_config  # transformers' mark on a model that it dequantised
        along = ask.bytes is not None and sparse and ask.text is None and holds_path(self._model)
        if not sparse or ask.sparsity is not None or (ask.bytes is not None and not along):
            config = SparsifyConfig(**ask.settings)
            window_NC = fit_windows(load_corpus(ask.text), self._model, self.tokenizer, config.calibration_tokens)
            tokens, front = window_NC.numel(), front_tokens(self.tokenizer)
            if not sparse:
                self._skipped = discover(self._model, ask.include, ask.exclude).report()
                make_sparse(self._model, window_NC, config, front, include=ask.include, exclude=ask.exclude)
            if ask.sparsity is not None:
                reach_sparsity(self._model, ask.sparsity, window_NC, front)
            if ask.bytes is not None:
                reach_bytes(self._model, ask.bytes, window_NC, front)
        if along and ask.bytes is not None:
            set_budget(self._model, ask.bytes)
        if ask.tau is not None:
            set_tau(self._model, ask.tau)
        return tokens

    def _merge_adapter(self) -> None:
        # Grouping neurons moves them, and an adapter's rows belong to the places where they were.
        if hasattr(self._model, "merge_and_unload"):
            self._model = self._model.merge_and_unload()

    # --- counting -----------------------------------------------------------------------------------------------------

    def reset_sparsity(self) -> None:
        """Forget what was counted, as between two evaluations with one model."""
        self._tokens = 0
        self._drop()
        if self._record is not None:
            self._record = self._new_record()

    def _new_record(self) -> SparsityRecord:
        record, views = SparsityRecord(), sparse_views(self._model)
        for name, layer in sparse_layers(self._model).items():
            record.share_tally(name, layer, views[name])
        return record

    def _note(self, name: str, layer: RoutedExperts, routing: Routing) -> None:
        self._noted.append(Noted.of(name, layer, routing.mask_TE, routing.x_TD))

    def _take(self) -> list[Noted]:
        """What was noted since the last time, in the order of the calls."""
        counted = {name: iter(list(values)) for name, values in self._counted.items()}
        noted = [
            call
            if call.reads is None or call.reads.counted_T is not None
            else call.with_counted(next(counted[call.name]))
            for call in self._noted
        ]
        self._drop()
        return noted

    def _drop(self) -> None:
        """Forget what was noted, also of a call that came to no end."""
        self._noted.clear()
        for counted in self._counted.values():
            counted.clear()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._record is None:
            return super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        self._drop()  # of a batch that nobody scored: lm-eval was looking for the largest that fits
        logits: Tensor = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        self._scored = _Scored(self._take(), attn_mask, rows=inps.shape[0], lengths=[])
        return logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """Called for each row of a batch in turn: the only place that is told how long the row is."""
        scored = self._scored
        if scored is not None:
            length = inplen if self.backend == "causal" else contlen
            assert length is not None
            scored.lengths.append(length)
            if len(scored.lengths) == scored.rows:
                self._count_scored(scored)
                self._scored = None
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _count_scored(self, scored: _Scored) -> None:
        assert self._record is not None
        for noted in scored.noted:
            if scored.encoder_mask is not None and self._in_encoder(noted.name):
                keep_T = scored.encoder_mask.reshape(-1).bool()
            else:
                keep_T = first_tokens(scored.lengths, len(noted.inactive_T))
            self._record.count(noted, keep_T)
        self._tokens += sum(scored.lengths) + (0 if scored.encoder_mask is None else int(scored.encoder_mask.sum()))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if self._record is None:
            return super()._model_generate(context, max_length, stop, **options)
        self._drop()
        ids: Tensor = super()._model_generate(context, max_length, stop, **options)
        start = context.shape[1] if self.backend == "causal" else 1
        lengths = [self._written(row, stop) for row in ids[:, start:].tolist()]
        mask = options.get("attention_mask")
        self._count_generated(self._take(), torch.ones_like(context) if mask is None else mask, lengths)
        return ids

    def _count_generated(self, noted: list[Noted], context_mask: Tensor, lengths: list[int]) -> None:
        """Count prompts without padding, and what each row wrote before it was done. Beams count one by one."""
        assert self._record is not None
        rows, width = context_mask.shape
        self._tokens += int(context_mask.sum())
        calls: dict[str, int] = {}
        for call in noted:
            step = calls[call.name] = calls.get(call.name, -1) + 1
            tokens = len(call.inactive_T)
            if (step == 0 and self.backend == "causal") or self._in_encoder(call.name):
                keep_T = context_mask.bool().repeat_interleave(tokens // (rows * width), 0).reshape(-1)
            elif tokens == rows:
                keep_T = torch.tensor([step < length or step == 0 for length in lengths])
            else:
                keep_T = torch.ones(tokens, dtype=torch.bool)
            self._record.count(call, keep_T)
        self._tokens += sum(max(0, length - 1) for length in lengths)

    def _written(self, ids: Sequence[int], stop: Sequence[str]) -> int:
        """How many tokens of a row were generated until it was done: up to the first that ends it, or all."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.eot_token_id}
        done = next((n for n, token in enumerate(ids, 1) if token in ends), len(ids))

        def stopped(n: int) -> bool:
            text = self.tokenizer.decode(ids[:n])
            return any(sequence in text for sequence in stop)

        return first_where(stopped, done)

    def _in_encoder(self, name: str) -> bool:
        if self.backend == "causal":
            return False
        encoder = self.model.get_encoder()
        layers = {id(module) for module in encoder.modules() if isinstance(module, RoutedExperts)}
        return id(sparse_layers(self._model)[name]) in layers

    # --- reporting ----------------------------------------------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's own entries, and ``prunepath``: tau, and the sparsity over the tokens evaluated so far."""
        found = self.sparsity_info()
        if found["sparsity"] is not None:
            text = f"{found['sparsity']:.1%} of the FFN neurons were inactive, over {found['tokens']} tokens"
            text += f", and {found['bytes']:.1%} of the FFN bytes were read"
            logger.info("%s (tau %s)", text, "differs by layer" if found["tau"] is None else found["tau"])
        return {**super().get_model_info(), "prunepath": found}

    def sparsity_info(self) -> dict[str, Any]:
        """What ran, ready for JSON.

        ``tau`` is None where layers have values of their own; ``sparsity`` and ``bytes`` are None where nothing was
        measured.
        ``tokens`` counts those that the model read, without padding.
        """
        record = self._record
        measured = record is not None and record.tokens > 0
        shares = record.shares_per_layer if record is not None else {}
        return {
            "tau": model_tau(self._model),
            "sparsity": record.sparsity if record is not None and measured else None,
            "bytes": record.shares.bytes if record is not None and measured else None,
            "tokens": None if record is None else self._tokens,
            **in_force(self._model),
            "sparsity_per_layer": {} if record is None else record.per_layer,
            "bytes_per_layer": {name: share.bytes for name, share in shares.items()},
            "target_sparsity": self._ask.sparsity,
            "target_bytes": self._ask.bytes,
            "settings": self._ask.settings,
            "skipped": self._skipped,
            "calibration_tokens": self._calibration_tokens,
            "compile_backend": self._compiler,
        }


class _NeuronNotes:
    """A recorder of :func:`torch_prunepath.layer.views.recording_neurons` that counts, call by call."""

    def __init__(self, counted: list[Tensor]) -> None:
        self._counted = counted

    def note_neurons(self, neurons: Neurons) -> None:
        """Keep how many neurons counted for each token."""
        self._counted.append(counted_neurons(neurons))


@dataclasses.dataclass
class _Scored:
    """A batch that was run, while lm-eval goes through its rows."""

    noted: list[Noted]
    encoder_mask: Tensor | None
    rows: int
    lengths: list[int]


def first_tokens(lengths: Sequence[int], tokens: int) -> Tensor:
    """Which tokens of a batch padded on the right are real.

    Args:
        lengths: real tokens of each row.
        tokens: T, tokens of the batch.

    Returns:
        bool ``[T]``, row by row.
    """
    width = tokens // len(lengths)
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).reshape(-1)


def first_where(holds: Callable[[int], bool], last: int) -> int:
    """The least n in 1 .. ``last`` at which ``holds``, which stays true once it is, or ``last`` if none."""
    low, high = 1, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low if last else 0


def _compiler(backend: str) -> str | None:
    if backend in HF_BACKENDS:
        return None
    if backend not in torch.compiler.list_backends(exclude_tags=None):
        known = [*HF_BACKENDS, *torch.compiler.list_backends()]
        raise UserError(f"backend={backend!r} is not known: choose one of {', '.join(known)}")
    return backend


def _hugging_face_model(model: Any) -> Any:
    """The transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _holds_routers(config: Path) -> bool:
    return str(json.loads(config.read_text(encoding="utf-8")).get("peft_type")).lower() == METHOD


def _is_sparse_config(config: Any) -> bool:
    data = getattr(config, "quantization_config", None)
    method = data.get("quant_method") if isinstance(data, dict) else getattr(data, "quant_method", None)
    return method == METHOD


register()
