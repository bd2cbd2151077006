"""``Objective``, for any training loop: the tau of each step, its loss terms, and what the controller learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_prunepath.inputs.data import Inputs
from torch_prunepath.inputs.front import front_of, quiet
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.sparsity import layer_tau
from torch_prunepath.train.batches import as_dict, count_labels, count_tokens, is_causal, on_device, with_labels
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.optimizer import trained
from torch_prunepath.train.schedule import aim_at
from torch_prunepath.train.state import Pending, Progress, Record
from torch_prunepath.train.tape import RoutingTape
from torch_prunepath.train.terms import Targets, batch_terms, check_model


class Objective:
    """The parts of a training run that this library adds, for your own training loop.

    Args:
        model: the model that the loop calls: a sparse model, which may be wrapped in ``DistributedDataParallel``,
            sharded with FSDP2, or prepared by accelerate.
        config: the settings. Those of the loop itself (learning rates, accumulation, clipping) are not read.
        steps: optimiser steps of the whole run; phases are shares of them.
        teacher: the dense model in evaluation mode, for ``config.distill_logits``.
        progress: a run to go on with; None starts a new one. Save its ``state_dict()`` in checkpoints.
        across_processes: give every token the same weight, whichever process has it; without it every process has the
            same weight.

    Raises:
        ValueError: if model, config and teacher do not fit together.

    Example::

        objective = Objective(model, config, steps=1000)
        for step in range(1000):
            for batch in objective.begin([next(batches)]):
                objective.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            for record in objective.end():
                print(record)
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        steps: int,
        *,
        teacher: nn.Module | None = None,
        progress: Progress | None = None,
        across_processes: bool = False,
    ) -> None:
        self.model, self.config, self.steps, self.teacher = model, config, steps, teacher
        self.inner = unwrapped(model)
        self.tape = RoutingTape(self.inner, inputs=False, outputs=bool(config.distill_ffn))
        check_model(model, self.tape, config, teacher)
        self.progress = Progress(config) if progress is None else progress
        self.device = next(model.parameters()).device
        self.causal = is_causal(self.inner)
        self.tau: float | None = None
        self.stats: dict[str, Tensor] = {}
        self._taus: list[float] = []
        self._targets: list[float | None] = []
        self._by_batch: list[Tensor] = []
        self._across = across_processes
        self._shares: list[tuple[Tensor, Tensor]] = []
        self._number = 0

    def begin(self, group: Sequence[Any]) -> list[Inputs]:
        """Choose tau for the next step, or for each of its batches (see :class:`Phase`). :meth:`loss` sets it.

        Args:
            group: the batches whose gradients the step adds up.

        Returns:
            The same batches with labels, for :meth:`loss` one after the other.

        Raises:
            ValueError: if a batch is not a mapping or lacks labels.
        """
        self._aim(len(group))
        config = self.config
        labelled = "task" in config.losses
        batches = [with_labels(batch, self.causal) if labelled else as_dict(batch) for batch in group]
        by_token = self._parts([count_tokens(batch) for batch in batches])
        by_label = self._parts([count_labels(batch, self.causal) for batch in batches]) if labelled else by_token
        self._shares, self.stats, self._number = list(zip(by_label, by_token, strict=True)), {}, 0
        return batches

    def _aim(self, number: int) -> None:
        """Choose the target and the tau of each batch; all batches get the same where several processes must agree."""
        progress, config = self.progress, self.config
        place = (config.phases, progress.step, self.steps, config.seed)
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        aims = [aim_at(*place, *((batch, number) if alone else ())) for batch in range(number)]
        self._targets = [aim.sparsity for aim in aims]
        tau_for = progress.controller.tau_for
        self._taus = [tau_for(aim.sparsity) if aim.tau is None else aim.tau for aim in aims]  # type: ignore[arg-type]
        self._by_batch = []

    def loss(self, batch: Inputs, model: nn.Module | None = None) -> Tensor:
        """Run the model on a batch of the step, and return the weighted sum of its loss terms, 0-d float32.

        Call ``backward()`` on it. The losses of a step's batches are parts of the step's loss: add up the gradients,
        and do not divide them by the number of batches.

        Args:
            batch: the next of the batches that :meth:`begin` returned.
            model: a wrapper of the objective's model that is called instead of it; None calls the model itself.

        Raises:
            ValueError: if the model did not run its sparse layers, returned no loss, or the scores have no gradient.
        """
        batch = on_device(batch, self.device)
        by_label, by_token = self._shares[self._number]
        self.tau = self._taus[self._number]
        write_tau(self.tape.layers.values(), self.tau)
        terms = self._terms(batch, f"fit {self.config.seed} {self.progress.step} {self._number}", model)
        self._number += 1
        for name, term in terms.items():
            terms[name] = _times(term, by_label if name == "task" else by_token)
        loss = torch.stack([self.config.losses[k] * v.to(self.device) for k, v in terms.items()]).sum()
        sparsity = _times(self.tape.sparsity(), by_token)
        if len(set(self._taus)) > 1:
            self._by_batch += [sparsity.detach(), _times(torch.ones_like(sparsity), by_token)]
        for name, value in {"loss": loss, **terms, "sparsity": sparsity}.items():
            self.stats[name] = self.stats.get(name, 0) + value.detach().to(self.device)
        return loss

    def end(self, lr: float | None = None) -> list[Record]:
        """End the step: keep the means over its batches, without waiting for the device to compute them.

        Args:
            lr: the step's learning rate, for the record.

        Returns:
            The record of the step before, if there is one; see :func:`torch_prunepath.train.train`.

        Raises:
            FloatingPointError: if that step's loss is not finite.
        """
        assert self.tau is not None and self.complete, "end() comes after loss() of every batch"
        values = [value.float().to(self.device) for value in (*self.stats.values(), *self._by_batch)]
        means = mean_over_processes(torch.stack(values))
        progress = self.progress
        progress.pending.append(Pending(progress.step, self._taus, self._targets, lr, list(self.stats), means))
        progress.step += 1
        return progress.finished(keep=1)

    @property
    def begun(self) -> bool:
        """Whether :meth:`loss` has seen some batch of the step."""
        return self._number > 0

    @property
    def complete(self) -> bool:
        """Whether :meth:`loss` has seen every batch of the step."""
        return self._number == len(self._shares)

    def _parts(self, counts: list[Tensor]) -> list[Tensor]:
        """Each batch's share of the step, 0-d float32. Over all processes the shares sum to the number of processes."""
        counts_B = torch.stack(counts)
        total, scale = counts_B.sum(), 1
        if self._across and dist.is_available() and dist.is_initialized():
            counts_B, total = (value.to(self.device, non_blocking=True) for value in (counts_B, total))
            dist.all_reduce(total)
            scale = dist.get_world_size()
        return list(scale * counts_B / total.clamp_min(1))

    def _terms(self, batch: Inputs, seed: str, model: nn.Module | None) -> dict[str, Tensor]:
        config = self.config
        inputs = quiet(self.inner, batch if "task" in config.losses else self._without_loss(batch))
        teacher_logits = None
        self.tape.inside, self.tape.front = Targets(config, seed, self.device), front_of([batch])
        with torch.autocast(self.device.type, torch.bfloat16) if config.autocast else contextlib.nullcontext():
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(**quiet(self.teacher, self._without_loss(batch))).logits
            with self.tape:
                output = (self.model if model is None else model)(**inputs)
        self.tape.check(gradient=True)
        return batch_terms(config, self.tape, output, batch, teacher_logits)

    def _without_loss(self, batch: Inputs) -> Inputs:
        """Remove the labels from a causal language model's batch; other models may need them to run."""
        return {k: v for k, v in batch.items() if k != "labels" or not self.causal}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of ``DistributedDataParallel`` and ``torch.compile``."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    return getattr(model, "_orig_mod", model)


@contextlib.contextmanager
def others_frozen(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Freeze the parameters that ``config.train`` does not name while the context is open.

    Raises:
        ValueError: if no parameter is left to train.
    """
    chosen = trained(model, config)
    # By name: sharding puts other parameters in their place.
    frozen = {name for name, p in model.named_parameters() if p.requires_grad and name not in chosen}
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name not in frozen)
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or name in frozen)


@torch.no_grad()
def write_tau(layers: Iterable[RoutedExperts], tau: float) -> None:
    """Set one tau on all layers as :func:`torch_prunepath.set_tau` does, but leave the model's config alone."""
    for layer in layers:
        layer.tau.fill_(layer_tau(tau, layer.budget))


def mean_over_processes(values: Tensor) -> Tensor:
    """Average values over all processes, so that each chooses the same tau."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()


def _times(term: Tensor, share: Tensor) -> Tensor:
    # A 0-d tensor on the CPU is taken as a number; copying it to the device would wait for all that is queued there.
    return term * (share if share.device.type == "cpu" else share.to(term.device))
