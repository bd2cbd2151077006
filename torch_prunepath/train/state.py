"""The state of a training run: all that has to be saved, besides the model, to go on as if it had never stopped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.controller import SparsityController
from torch_prunepath.train.optimizer import build_optimizer

Record = dict[str, float]


class Pending:
    """A step whose numbers are still on their way from the device.

    Args:
        step: the step's number.
        taus: tau of each batch.
        targets: target sparsity of each batch, None where tau was given.
        lr: learning rate, for the record.
        names: names of the first values.
        values: means over the step by ``names``, float32. If taus differ, two more for each batch: its part of the
            step's sparsity, and its share of the step.
    """

    def __init__(
        self,
        step: int,
        taus: list[float],
        targets: list[float | None],
        lr: float | None,
        names: list[str],
        values: Tensor,
    ) -> None:
        self.step, self.taus, self.targets, self.lr, self.names = step, taus, targets, lr, names
        # Copied behind this step's work, so that reading them does not wait for what is queued after it.
        self._values = values.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def _read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()  # type: ignore[no-any-return]

    def record(self) -> Record:
        """Return the step's record, with tau and target as means over its batches, after the device has done the step.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        values = dict(zip(self.names, self._read(), strict=False))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {self.step}: lower the learning rates, or use a longer warmup"
            )
        targets = [target for target in self.targets if target is not None]
        aim = {"target": _mean(targets)} if targets else {}
        rate = {} if self.lr is None else {"lr": self.lr}
        return {"step": self.step, **values, **aim, "tau": _mean(self.taus), **rate}

    def observations(self) -> list[tuple[float, float]]:
        """Return each tau that the step ran at, with the sparsity that it gave."""
        values = self._read()
        apart = values[len(self.names) :]
        if not apart:
            return [(self.taus[0], values[self.names.index("sparsity")])]
        parts = zip(self.taus, apart[::2], apart[1::2], strict=True)
        return [(tau, sparsity / share) for tau, sparsity, share in parts if share > 0.0]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, from which :meth:`of` makes the step again."""
        named = {"step": self.step, "taus": list(self.taus), "targets": list(self.targets), "lr": self.lr}
        return {**named, "names": list(self.names), "values": self._read()}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Pending:
        """Make a step from the result of :meth:`state_dict`."""
        return cls(**{**state, "values": torch.tensor(state["values"], dtype=torch.float32)})


def _mean(values: list[float]) -> float:
    # A single value stays what it is, to the last bit.
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)


class Progress:
    """Controller and position of a run: all that has to be saved besides model, optimiser and random numbers.

    Args:
        config: the config of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.controller = SparsityController(config.control_rate)
        self.step = 0
        self.pending: list[Pending] = []

    def finished(self, keep: int) -> list[Record]:
        """Return the records of all but the latest ``keep`` steps, and let the controller learn from them."""
        records = []
        while len(self.pending) > keep:
            pending = self.pending.pop(0)
            records.append(pending.record())
            for tau, sparsity in pending.observations():
                self.controller.observe(tau, sparsity)
        return records

    def state_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, after waiting for the device."""
        return {
            "config": self.config.to_dict(),
            "controller": self.controller.state_dict(),
            "step": self.step,
            "pending": [pending.state_dict() for pending in self.pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the result of another :meth:`state_dict`.

        Raises:
            ValueError: if it was saved with another config.
        """
        mine = self.config.to_dict()
        for name, value in TrainConfig.from_dict(state["config"]).to_dict().items():
            if mine[name] != value:
                raise ValueError(
                    f"the saved state belongs to another run, with {name}={value!r}, not {mine[name]!r}: "
                    "resume with TrainConfig.from_dict(state['config'])"
                )
        self.controller.load_state_dict(state["controller"])
        self.step = state["step"]
        self.pending = [Pending.of(pending) for pending in state["pending"]]


class TrainState(Progress):
    """Optimiser, controller, random numbers and position of a run of :func:`torch_prunepath.train.train`.

    Save :meth:`state_dict` together with the model, and load both to go on: on CPU, stopping and resuming gives bit for
    bit what an uninterrupted run gives, provided the batches come in the same order.

    Args:
        model: the sparse model to be trained. Move it to its device, and shard it if wanted, beforehand.
        config: the config of the run.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__(config)
        self.optimizer = build_optimizer(model, config)
        self.rng: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that ``torch.save`` and ``torch.load`` with ``weights_only`` can handle."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict(), "rng": self.rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the result of another :meth:`state_dict`.

        Raises:
            ValueError: if it was saved with another config or for another model.
        """
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng = state["rng"]

    def remember_random(self, device: torch.device) -> None:
        """Remember the state of the random number generators."""
        self.rng = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            self.rng["cuda"] = torch.cuda.get_rng_state(device)

    @contextlib.contextmanager
    def own_random(self, device: torch.device) -> Iterator[None]:
        """Use the random number generators' state of this run while the context is open; then restore the caller's."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if self.rng is None:
                torch.manual_seed(self.config.seed)
            else:
                torch.set_rng_state(self.rng["cpu"].cpu())
                if device.type == "cuda" and "cuda" in self.rng:
                    torch.cuda.set_rng_state(self.rng["cuda"].cpu(), device)
            yield
