"""``transformers.Trainer`` with this package's objective, phases and controller."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from torch_prunepath.inputs.data import evaluation_mode
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.sparsity import record_sparsity, set_tau
from torch_prunepath.train.arguments import as_said, refuse, trainer_arguments
from torch_prunepath.train.batches import is_causal, with_labels
from torch_prunepath.train.compiling import check_compilable, compiled_with_teacher, keep_gradients
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.objective import Objective, mean_over_processes, others_frozen
from torch_prunepath.train.optimizer import build_optimizer
from torch_prunepath.train.schedule import Aim, Phase
from torch_prunepath.train.shard import contiguous
from torch_prunepath.train.state import Progress, Record

__all__ = ["PrunePathTrainer", "trainer_arguments"]


class PrunePathMemory(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Puts the controller of a run into ``trainer_state.json`` of each checkpoint."""

    progress: Progress | None = None
    saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What :class:`PrunePathTrainer` goes on with."""
        return {"args": {}, "attributes": {"saved": None if self.progress is None else self.progress.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run begins: whatever an earlier one has learnt belongs to it."""
        self.progress = None


class PrunePathTrainer(Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with the objective, phases and controller of :func:`torch_prunepath.train.train`.

    What ``TrainingArguments`` and ``TrainConfig`` can both say (steps, epochs, learning rate and its schedule, weight
    decay, accumulation, clipping, bf16, seed), ``TrainingArguments`` decide. A field of the config that is not at its
    default must say the same; :func:`trainer_arguments` makes them agree. The config alone decides on phases, losses,
    ``train``, and the learning rates of routers and normalisation layers.

    Logs hold, besides Trainer's, the mean over the steps since the last log of every loss term, realised ``sparsity``,
    its ``target`` and ``tau``. Evaluation and checkpoints are at the sparsity that the run ends at, the middle of the
    range if targets are drawn; ``eval_sparsity`` is what was realised there. Padding does not count, and the batches of
    one step count by their labels and tokens, over all processes if ``average_tokens_across_devices``. Resuming from a
    checkpoint gives what an uninterrupted run gives. A loss that is not finite ends the run with FloatingPointError.

    Args:
        model: a sparse model.
        args: see above.
        config: see above.
        teacher: the dense model, for ``config.distill_logits``.
        compile: train the model's blocks (and the teacher's) compiled, in the mode or with the backend of this name;
            see :func:`torch_prunepath.train.compiled_blocks`.
        **kwargs: of ``Trainer``; no ``model_init`` and no ``compute_loss_func``.

    Raises:
        ValueError: if config and args contradict each other, or ask for what this trainer does not do.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        config: TrainConfig,
        teacher: nn.Module | None = None,
        compile: bool | str = False,
        **kwargs: Any,
    ) -> None:
        sparse_layers(model)
        refuse(args, kwargs)
        self.train_config = as_said(config, args)
        if compile:
            check_compilable(model, self.train_config, checkpointing=args.gradient_checkpointing)
        self.teacher, self._compile = teacher, compile
        if self.train_config.trains_routers_apart:
            # DistributedDataParallel would look for unused parameters in the model's output, and find routers there.
            args.ddp_find_unused_parameters = False
        self._objective: Objective | None = None
        self._unlogged: list[Record] = []
        self._logged = -1
        if args.fsdp:
            contiguous(model)
        super().__init__(model, args, **kwargs)
        # The objective weighs the batches of a step itself; Trainer shall take its loss for a batch's mean.
        self.model_accepts_loss_kwargs = False
        self.add_callback(PrunePathMemory())
        if teacher is not None:
            teacher.to(args.device)

    # --- the run ------------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; afterwards the model's tau is that of the sparsity that the run ended at."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(others_frozen(self._sparse, self.train_config))
            if self.teacher is not None:
                stack.enter_context(evaluation_mode(self.teacher))
            stack.enter_context(compiled_with_teacher(self._sparse, self.teacher, self._compile))
            try:
                output = super().train(*args, **kwargs)
                progress = self._memory.progress
                if progress is not None:
                    progress.finished(keep=0)
                return output
            finally:
                self._objective = None
                self._write_held_tau()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of ``args.optim``, with a group each for trunk, routers and normalisation layers."""
        self._saved()
        if self.optimizer is None:
            model = self._sparse if model is None else model
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]
            takes_groups = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
            if not takes_groups or settings.keys() & {"params", "model", "optimizer_dict"}:
                raise ValueError(
                    f"optim={self.args.optim} makes its own parameter groups: use 'adamw_torch' or its like"
                )
            groups = build_optimizer(model, self.train_config).param_groups
            kept = [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups]
            self.optimizer = kind(kept, **settings)
        return super().create_optimizer(model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of the next step, with labels, after its tau is chosen."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        return (self._running().begin(samples) if samples else samples), items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch."""
        assert self._objective is not None
        if self._objective.begun:
            keep_gradients(self._sparse, self._compile)
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._objective.complete:
            self._unlogged += self._objective.end()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, the whole objective; in evaluation, the model's own loss."""
        if self._objective is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Trainer divides by the number of batches.
        loss = self._objective.loss(inputs, model) * self.current_gradient_accumulation_steps
        return (loss, {}) if return_outputs else loss

    def _running(self) -> Objective:
        """The objective of the run in progress; the first call makes it, from the checkpoint if there is one."""
        memory = self._memory
        if memory.progress is None or self._objective is None:
            progress = Progress(self.train_config)
            saved = self._saved()
            if saved is not None:
                progress.load_state_dict(saved)
            self._objective = Objective(
                self.model_wrapped,
                self.train_config,
                self.state.max_steps,
                teacher=self.teacher,
                progress=progress,
                across_processes=self.args.average_tokens_across_devices,
            )
            self._unlogged, self._logged = [], progress.step - 1
            memory.progress = progress
        return self._objective

    @property
    def _sparse(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _saved(self) -> dict[str, Any] | None:
        """The state of the objective in the checkpoint that the run goes on from, if it does."""
        if not self.state.global_step:
            return None
        callbacks: Any = self.state.stateful_callbacks
        memory = callbacks.get(PrunePathMemory.__name__)
        if memory is None:
            raise ValueError("the checkpoint was saved by another trainer: load it with from_pretrained and start anew")
        return memory["attributes"]["saved"]  # type: ignore[no-any-return]

    @property
    def _memory(self) -> PrunePathMemory:
        return next(each for each in self.callback_handler.callbacks if isinstance(each, PrunePathMemory))

    # --- logs, evaluation, checkpoints --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.log``, with what the objective has to say."""
        if "loss" in logs and self._objective is not None:
            logs = {**logs, **self._means()}
        super().log(logs, *args, **kwargs)

    def _means(self) -> dict[str, float]:
        assert self._objective is not None
        # Looked at, not taken: when the controller learns of a step must not depend on how often one logs.
        records = [*self._unlogged, *(pending.record() for pending in self._objective.progress.pending)]
        records = [record for record in records if record["step"] > self._logged]
        self._unlogged = []
        if not records:
            return {}
        self._logged = int(records[-1]["step"])
        names = dict.fromkeys(name for record in records for name in record if name not in ("step", "loss"))
        values = {name: [record[name] for record in records if name in record] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As ``Trainer.evaluation_loop``, at the sparsity that the run ends at; adds ``sparsity`` and ``tau``."""
        tau = self._write_held_tau()
        with record_sparsity(self._sparse) as record:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        realised = mean_over_processes(torch.tensor(record.sparsity, device=self.args.device))
        found = {"sparsity": float(realised)} | ({} if tau is None else {"tau": tau})
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{name}": value for name, value in found.items()}}
        return output._replace(metrics=metrics)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.prediction_step``; a causal language model's labels are its tokens where it has none."""
        if is_causal(self._sparse) and inputs.get("labels") is None:
            inputs = with_labels(inputs, causal=True)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.save_model``: an ordinary sparse checkpoint, its tau that of the sparsity the run ends at."""
        self._write_held_tau()
        super().save_model(*args, **kwargs)

    def _write_held_tau(self) -> float | None:
        """Set the tau of the run's last aim, where a run has begun."""
        progress = self._memory.progress
        if progress is None:
            return None
        aim = _held(self.train_config.phases[-1])
        tau = progress.controller.tau_for(aim.sparsity) if aim.tau is None else aim.tau  # type: ignore[arg-type]
        set_tau(self._sparse, tau)
        return tau


def _held(phase: Phase) -> Aim:
    """What a run that ends with this phase is for."""
    if phase.kind == "tau":
        return Aim(tau=phase.last)
    return Aim(sparsity=(phase.first + phase.last) / 2 if phase.drawn else phase.last)
