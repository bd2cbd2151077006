"""``transformers.Trainer`` with this package's objective, phases and controller."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from torch_prunepath.inputs.data import evaluation_mode
from torch_prunepath.layer.layout import contiguous
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.sparsity import record_sparsity, set_tau
from torch_prunepath.train.arguments import as_said, refuse, trainer_arguments
from torch_prunepath.train.batches import is_causal, with_labels
from torch_prunepath.train.compiling import check_compilable, compiled_with_teacher, keep_gradients
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.objective import Objective, mean_over_processes, others_frozen
from torch_prunepath.train.optimizer import build_optimizer
from torch_prunepath.train.schedule import Aim, Phase
from torch_prunepath.train.state import Progress, Record

__all__ = ["PrunePathTrainer", "trainer_arguments"]


class PrunePathMemory(TrainerCallback, ExportableState):  # type: ignore[misc]
    """A callback that saves the progress of a run in ``trainer_state.json`` of each checkpoint."""

    progress: Progress | None = None
    saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return the state from which :class:`PrunePathTrainer` goes on, as Trainer saves it."""
        return {"args": {}, "attributes": {"saved": None if self.progress is None else self.progress.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the progress of an earlier run when a new one begins."""
        self.progress = None


class PrunePathTrainer(Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with the objective, phases and controller of :func:`torch_prunepath.train.train`.

    ``TrainingArguments`` decide the settings that ``TrainConfig`` has as well: steps, epochs, learning rate and its
    schedule, weight decay, accumulation, clipping, bf16 and seed. Where such a field of the config is not at its
    default, it must have the same value; :func:`trainer_arguments` makes them agree. The config alone decides phases,
    losses, ``train``, and the learning rates of routers and normalisation layers.

    Besides Trainer's own values, logs hold every loss term, realised ``sparsity``, its ``target`` and ``tau``, as means
    over the steps since the last log. Evaluation and checkpoints use the sparsity at which the run ends, or the middle
    of the range if targets are drawn; ``eval_sparsity`` is the sparsity realised there. Padding does not count. The
    batches of one step are weighed by their labels and tokens, over all processes if
    ``average_tokens_across_devices``. A resumed run gives the same as an uninterrupted one. A loss that is not finite
    ends the run with FloatingPointError.

    Args:
        model: a sparse model.
        args: Trainer's settings.
        config: this library's settings.
        teacher: the dense model, for ``config.distill_logits``.
        compile: train the model's blocks (and the teacher's) compiled, in the mode or with the backend of this name;
            see :func:`torch_prunepath.train.compiled_blocks`.
        **kwargs: further arguments of ``Trainer``, except ``model_init`` and ``compute_loss_func``.

    Raises:
        ValueError: if config and args contradict each other, or ask for something that this trainer does not do.
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
        """Train as ``Trainer.train`` does. Afterwards the model has the tau of the sparsity at which the run ended."""
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
                self._write_final_tau()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser of ``args.optim``, with separate groups for trunk, routers and normalisation layers.

        Raises:
            ValueError: if that optimiser does not take parameter groups.
        """
        self._saved()
        if self.optimizer is None:
            model = self._sparse if model is None else model
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[arg-type]
            takes_groups = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
            if not takes_groups or settings.keys() & {"params", "model", "optimizer_dict"}:
                raise ValueError(
                    f"optim={self.args.optim} makes its own parameter groups: use 'adamw_torch' or a similar optimiser"
                )
            groups = build_optimizer(model, self.train_config).param_groups
            kept = [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups]
            self.optimizer = kind(kept, **settings)
        return super().create_optimizer(model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Choose the tau of the next step, and return the step's batches with labels."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        return (self._running().begin(samples) if samples else samples), items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one batch."""
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
        """Return the whole objective in training, and the model's own loss in evaluation."""
        if self._objective is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Trainer divides by the number of batches.
        loss = self._objective.loss(inputs, model) * self.current_gradient_accumulation_steps
        return (loss, {}) if return_outputs else loss

    def _running(self) -> Objective:
        """Return the objective of the current run; the first call makes it, from the checkpoint if there is one."""
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
        """Return the progress saved in the checkpoint from which the run goes on; None for a new run."""
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
        """Log as ``Trainer.log`` does, with the means of the objective's records added."""
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
        """Evaluate as ``Trainer.evaluation_loop`` does, at the sparsity at which the run ends.

        The metrics also hold the realised ``sparsity`` and ``tau``.
        """
        tau = self._write_final_tau()
        with record_sparsity(self._sparse) as record:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        realised = mean_over_processes(torch.tensor(record.sparsity, device=self.args.device))
        found = {"sparsity": float(realised)} | ({} if tau is None else {"tau": tau})
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{name}": value for name, value in found.items()}}
        return output._replace(metrics=metrics)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as ``Trainer.prediction_step`` does; a causal language model without labels is given its tokens."""
        if is_causal(self._sparse) and inputs.get("labels") is None:
            inputs = with_labels(inputs, causal=True)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save an ordinary sparse checkpoint as ``Trainer.save_model`` does, with the tau at which the run ends."""
        self._write_final_tau()
        super().save_model(*args, **kwargs)

    def _write_final_tau(self) -> float | None:
        """Set and return the tau of the run's final aim; None, and nothing is set, before a run has begun."""
        progress = self._memory.progress
        if progress is None:
            return None
        aim = _final_aim(self.train_config.phases[-1])
        tau = progress.controller.tau_for(aim.sparsity) if aim.tau is None else aim.tau  # type: ignore[arg-type]
        set_tau(self._sparse, tau)
        return tau


def _final_aim(phase: Phase) -> Aim:
    """Return the tau or sparsity at which the model of a run that ends with this phase is evaluated and saved."""
    if phase.kind == "tau":
        return Aim(tau=phase.last)
    return Aim(sparsity=(phase.first + phase.last) / 2 if phase.drawn else phase.last)
