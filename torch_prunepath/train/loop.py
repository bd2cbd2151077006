"""The training loop: plain PyTorch, in one process or in one for each device (DistributedDataParallel, FSDP2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_prunepath.inputs.data import evaluation_mode
from torch_prunepath.progress import progress_bar
from torch_prunepath.sparsity import set_tau
from torch_prunepath.train.batches import endless, take
from torch_prunepath.train.compiling import check_compilable, compiled_with_teacher, keep_gradients
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.objective import Objective, others_frozen
from torch_prunepath.train.optimizer import lr_factor
from torch_prunepath.train.state import Record, TrainState

Callback = Callable[[TrainState, Record], Any]


def train(
    model: nn.Module,
    batches: Iterable[Any],
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    state: TrainState | None = None,
    compile: bool | str = False,
    progress: bool = True,
    callback: Callback | None = None,
) -> list[Record]:
    """Train a sparse model in place. Its tau is afterwards that of the last step (see :func:`set_sparsity`).

    Args:
        model: a sparse model whose weights have the dtype that the optimiser works in (float32; see
            ``config.autocast``). It may be wrapped in ``DistributedDataParallel`` or sharded with FSDP2 (see
            :func:`torch_prunepath.contiguous`); then every process has the same weight, however many tokens it
            has.
        batches: dicts of model inputs with ``labels``; or with ``input_ids`` alone, for a causal language model. They
            are iterated as often as needed. To resume a run, they must come in the same order each time.
        config: the settings of the run, see :class:`TrainConfig` and :mod:`torch_prunepath.train.recipes`.
        teacher: the dense model, for ``config.distill_logits``.
        state: a run to go on with, ``TrainState(model, config)`` after ``load_state_dict``; None starts a new one.
        compile: run the model's blocks (and the teacher's) through ``torch.compile``, in the mode or with the backend
            of this name; see :func:`torch_prunepath.train.compiled_blocks`. Batches should have one shape.
        progress: show a progress bar with loss, realised sparsity and tau.
        callback: called as ``callback(state, record)`` for each step; a true result ends the run. So that the device
            never waits, ``record`` is one step older than ``state``. If the callback ends the run, the record of the
            last step comes first in the run that goes on from ``state``.

    Returns:
        One record for each step: ``step``, ``loss``, its unweighted terms by name, realised ``sparsity``, ``target``
        sparsity if there was one, ``tau``, and ``lr``, the learning rate of the model's own weights.

    Raises:
        ValueError: if model, batches, teacher and config do not fit together.
        FloatingPointError: if the loss is not finite.
    """
    run = _Run(model, config, teacher, state, steps_of(config, batches), compile)
    history: list[Record] = []
    with run.open(), progress_bar(total=run.steps, initial=run.state.step, desc="training", progress=progress) as bar:

        def report(records: list[Record]) -> bool:
            for record in records:
                history.append(record)
                bar.set_postfix({k: f"{record[k]:.4g}" for k in ("loss", "sparsity", "tau")}, refresh=False)
            return any([callback(run.state, record) for record in records] if callback is not None else [])

        feed = endless(batches, run.state.step * config.accumulation)
        stopped = False
        while run.state.step < run.steps and not stopped:
            records = run.step(take(feed, config.accumulation))
            bar.update()
            stopped = report(records)
        if not stopped:
            report(run.state.finished(keep=0))
    return history


def steps_of(config: TrainConfig, batches: Iterable[Any]) -> int:
    """Return the number of optimiser steps of a whole run over these batches.

    Raises:
        ValueError: if the config gives epochs and the number of batches is not known.
    """
    if config.steps is not None:
        return config.steps
    if not isinstance(batches, Sized):
        raise ValueError("epochs= needs batches whose number is known: pass a list or a sized data loader, or steps=")
    assert config.epochs is not None
    return max(1, math.ceil(config.epochs * len(batches) / config.accumulation))


class _Run:
    """One call of :func:`train`."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        teacher: nn.Module | None,
        state: TrainState | None,
        steps: int,
        compile: bool | str = False,
    ) -> None:
        if state is not None and state.config != config:
            raise ValueError("the state is of another config: pass state.config, or start anew without state=")
        if compile:
            check_compilable(model, config)
        self.model, self.config, self.teacher, self.steps, self.compile = model, config, teacher, steps, compile
        self.state = TrainState(model, config) if state is None else state
        self.objective = Objective(model, config, steps, teacher=teacher, progress=self.state)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Set modes, frozen parameters and random numbers as training needs them, and restore them afterwards."""
        objective = self.objective
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            if self.teacher is not None:
                stack.enter_context(evaluation_mode(self.teacher))
            stack.enter_context(self.state.own_random(objective.device))
            stack.enter_context(others_frozen(self.model, self.config))
            stack.enter_context(compiled_with_teacher(objective.inner, self.teacher, self.compile))
            self.model.train()
            try:
                yield
            finally:
                self.state.optimizer.zero_grad(set_to_none=True)
                if objective.tau is not None:
                    set_tau(objective.inner, objective.tau)

    def step(self, group: Sequence[Any]) -> list[Record]:
        """Do one optimiser step over some batches, and return the record of the step before."""
        state, config = self.state, self.config
        factor = lr_factor(config, state.step, self.steps)
        for settings in state.optimizer.param_groups:
            settings["lr"] = settings["peak"] * factor
        self.backward(group)
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for g in state.optimizer.param_groups for p in g["params"]], config.clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.remember_random(self.objective.device)
        return self.objective.end(lr=config.lr * factor)

    def backward(self, group: Sequence[Any]) -> dict[str, Tensor]:
        """Add up the gradients of some batches as for one large batch. Returns the step's means, on the device."""
        batches = self.objective.begin(group)
        for number, batch in enumerate(batches, 1):
            if number > 1:
                keep_gradients(self.objective.inner, self.compile)
            with self._apart() if number < len(batches) else contextlib.nullcontext():
                self.objective.loss(batch).backward()
        return self.objective.stats

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """Keep the gradients of a batch in this process; those of the step's last batch are exchanged."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()
