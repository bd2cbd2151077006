"""The training loop: plain PyTorch, in one process or in one for each device (DistributedDataParallel)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from torch_prunepath.calibrate import quiet
from torch_prunepath.data import Inputs, evaluation_mode
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.sparsity import layer_tau, set_tau
from torch_prunepath.train.batches import (
    as_dict,
    count_labels,
    count_tokens,
    endless,
    is_causal,
    on_device,
    take,
    with_labels,
)
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.objective import batch_terms, check_model
from torch_prunepath.train.optimizer import lr_factor, trained
from torch_prunepath.train.schedule import aim_at
from torch_prunepath.train.state import Pending, TrainState
from torch_prunepath.train.tape import RoutingTape

Record = dict[str, float]
Callback = Callable[[TrainState, Record], Any]


def train(
    model: nn.Module,
    batches: Iterable[Any],
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    state: TrainState | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> list[Record]:
    """Train a sparse model in place; afterwards its tau is that of the last step (see :func:`set_sparsity`).

    Args:
        model: a sparse model whose weights are in the dtype that the optimiser shall work in (float32; see
            ``config.autocast``); or one wrapped in ``DistributedDataParallel``, whose processes count alike whatever
            number of tokens each has.
        batches: dicts of model inputs with ``labels``; or with ``input_ids`` alone, for a causal language model.
            Iterated over and over; in the same order each time if runs shall be resumable.
        config: see :class:`TrainConfig` and :mod:`torch_prunepath.train.recipes`.
        teacher: the dense model, for ``config.distill_logits``.
        state: a run to go on with, ``TrainState(model, config)`` after ``load_state_dict``; None starts one.
        progress: show a progress bar with loss, realised sparsity and tau.
        callback: called as ``callback(state, record)`` for each step; a true answer ends the run. So that the device
            never waits, the record is that of the step before the last that ``state`` has done; where the
            run is ended so, the last step's record comes first in the run that goes on from ``state``.

    Returns:
        A record a step: ``step``, ``loss``, its unweighted terms by name, realised ``sparsity``, ``target`` sparsity if
        there was one, ``tau``, and ``lr``, that of the trunk's peak times the schedule.

    Raises:
        ValueError: if model, batches, teacher and config do not fit together.
        FloatingPointError: if the loss is not finite.
    """
    run = _Run(model, config, teacher, state, _steps(config, batches))
    history: list[Record] = []
    with run.open(), tqdm(total=run.steps, initial=run.state.step, desc="training", disable=not progress) as bar:

        def report(records: list[Record]) -> bool:
            for record in records:
                history.append(record)
                bar.set_postfix({k: f"{record[k]:.4g}" for k in ("loss", "sparsity", "tau")}, refresh=False)
            return any([callback(run.state, record) for record in records] if callback is not None else [])

        feed = endless(batches, run.state.step * config.accumulation)
        stopped = False
        while run.state.step < run.steps and not stopped:
            run.step(take(feed, config.accumulation))
            bar.update()
            stopped = report(run.finished(keep=1))
        if not stopped:
            report(run.finished(keep=0))
    return history


def _steps(config: TrainConfig, batches: Iterable[Any]) -> int:
    if config.steps is not None:
        return config.steps
    if not isinstance(batches, Sized):
        raise ValueError("epochs= needs batches whose number is known: pass a list or a sized data loader, or steps=")
    assert config.epochs is not None
    return max(1, math.ceil(config.epochs * len(batches) / config.accumulation))


class _Run:
    """One call of :func:`train`."""

    def __init__(
        self, model: nn.Module, config: TrainConfig, teacher: nn.Module | None, state: TrainState | None, steps: int
    ) -> None:
        if state is not None and state.config != config:
            raise ValueError("the state is of another config: pass state.config, or start anew without state=")
        self.model, self.config, self.teacher, self.steps = model, config, teacher, steps
        self.inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.tape = RoutingTape(
            self.inner, inputs=bool(config.contribution_fit or config.distill_ffn), outputs=bool(config.distill_ffn)
        )
        check_model(model, self.tape, config, teacher)
        self.state = TrainState(model, config) if state is None else state
        self.device = next(model.parameters()).device
        self.causal = is_causal(self.inner)
        self.tau: float | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Modes, frozen parameters and random numbers as training needs them; afterwards as they were."""
        chosen = {id(p) for p in trained(self.model, self.config).values()}
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in chosen]
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            if self.teacher is not None:
                stack.enter_context(evaluation_mode(self.teacher))
            stack.enter_context(self.state.own_random(self.device))
            self.model.train()
            try:
                for p in frozen:
                    p.requires_grad_(False)
                yield
            finally:
                self.state.optimizer.zero_grad(set_to_none=True)
                for p in frozen:
                    p.requires_grad_(True)
                if self.tau is not None:
                    set_tau(self.inner, self.tau)

    def step(self, group: Sequence[Any]) -> None:
        """One optimiser step over some batches."""
        state, config = self.state, self.config
        factor = lr_factor(config, state.step, self.steps)
        for settings in state.optimizer.param_groups:
            settings["lr"] = settings["peak"] * factor
        aim = aim_at(config.phases, state.step, self.steps, config.seed)
        self.tau = state.controller.tau_for(aim.sparsity) if aim.tau is None else aim.tau  # type: ignore[arg-type]
        write_tau(self.tape.layers.values(), self.tau)
        stats = self.backward(group)
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for g in state.optimizer.param_groups for p in g["params"]], config.clip)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        values = _over_processes(torch.stack([value.float() for value in stats.values()]))
        state.pending.append(Pending(state.step, self.tau, aim.sparsity, config.lr * factor, list(stats), values))
        state.step += 1
        state.remember_random(self.device)

    def backward(self, group: Sequence[Any]) -> dict[str, Tensor]:
        """Add up the gradients of some batches as for one large batch; returns their means, on the device."""
        labelled = "task" in self.config.losses
        prepared = [with_labels(batch, self.causal) if labelled else as_dict(batch) for batch in group]
        labels = [count_labels(batch, self.causal) for batch in prepared] if labelled else []
        tokens = [count_tokens(batch) for batch in prepared]
        stats: dict[str, Tensor] = {}
        for number, batch in enumerate(prepared):
            by_token = _share(tokens, number)
            terms = self._terms(on_device(batch, self.device), f"fit {self.config.seed} {self.state.step} {number}")
            for name, term in terms.items():
                terms[name] = term * (_share(labels, number) if name == "task" else by_token).to(term.device)
            loss = torch.stack([self.config.losses[k] * v.to(self.device) for k, v in terms.items()]).sum()
            loss.backward()
            sparsity = self.tape.sparsity() * by_token.to(self.tape.calls[0].scores_TE.device)
            for name, value in {"loss": loss, **terms, "sparsity": sparsity}.items():
                stats[name] = stats.get(name, 0) + value.detach().to(self.device)
        return stats

    def _terms(self, batch: Inputs, seed: str) -> dict[str, Tensor]:
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.config.autocast)
        inputs = quiet(self.inner, batch if "task" in self.config.losses else self._without_loss(batch))
        teacher_logits = None
        with autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(**quiet(self.teacher, self._without_loss(batch))).logits
            with self.tape:
                output = self.model(**inputs)
        self.tape.check(gradient=True)
        return batch_terms(self.config, self.tape, output, batch, teacher_logits, seed, autocast)

    def _without_loss(self, batch: Inputs) -> Inputs:
        """The batch so that a causal language model computes no loss; others may need labels to run."""
        return {k: v for k, v in batch.items() if k != "labels" or not self.causal}

    def finished(self, keep: int) -> list[Record]:
        """Records of all but the latest ``keep`` steps; the controller learns from them."""
        records = []
        while len(self.state.pending) > keep:
            record = self.state.pending.pop(0).read()
            self.state.controller.observe(record["tau"], record["sparsity"])
            records.append(record)
        return records


def _over_processes(values: Tensor) -> Tensor:
    """The mean over all processes, so that each chooses the same tau."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()


def _share(counts: Sequence[Tensor], number: int) -> Tensor:
    return counts[number] / torch.stack(list(counts)).sum().clamp_min(1)


@torch.no_grad()
def write_tau(layers: Iterable[RoutedExperts], tau: float) -> None:
    """As :func:`torch_prunepath.set_tau` does with one number, without telling the model's config."""
    for layer in layers:
        layer.tau.fill_(layer_tau(tau, layer.budget))
