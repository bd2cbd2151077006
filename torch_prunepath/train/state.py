"""Where a training run is: what has to be saved, besides the model, to go on as if it had never stopped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.controller import SparsityController
from torch_prunepath.train.optimizer import build_optimizer


@dataclass
class Pending:
    """A step whose numbers are still on the device."""

    step: int
    tau: float
    target: float | None
    lr: float
    names: list[str]
    values: Tensor

    def read(self) -> dict[str, float]:
        """The step's record; waits for the device.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        values = dict(zip(self.names, self.values.tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss is {values['loss']} at step {self.step}: lower the learning rates or give a longer warmup"
            )
        aim = {} if self.target is None else {"target": self.target}
        return {"step": self.step, **values, **aim, "tau": self.tau, "lr": self.lr}


class TrainState:
    """Optimiser, controller, random numbers and position of a run of :func:`torch_prunepath.train.train`.

    Save :meth:`state_dict` together with the model, and load both to go on: on CPU, stopping and resuming gives bit for
    bit what an uninterrupted run gives, provided the batches come in the same order.

    Args:
        model: the sparse model to be trained, on its device.
        config: the run's.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.optimizer = build_optimizer(model, config)
        self.controller = SparsityController(config.control_rate)
        self.step = 0
        self.pending: list[Pending] = []
        self.rng: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; ``torch.save`` takes it, and ``torch.load`` with ``weights_only`` gives it back."""
        return {
            "config": self.config.to_dict(),
            "optimizer": self.optimizer.state_dict(),
            "controller": self.controller.state_dict(),
            "step": self.step,
            "pending": [dict(vars(pending)) for pending in self.pending],
            "rng": self.rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: if it was saved with another config, or of another model.
        """
        mine = self.config.to_dict()
        for name, value in state["config"].items():
            if mine.get(name) != value:
                raise ValueError(
                    f"the saved state is of another run, with {name}={value!r}, not {mine.get(name)!r}: "
                    "resume with TrainConfig.from_dict(state['config'])"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        self.controller.load_state_dict(state["controller"])
        self.step = state["step"]
        self.pending = [Pending(**pending) for pending in state["pending"]]
        self.rng = state["rng"]

    def remember_random(self, device: torch.device) -> None:
        """Note where the random numbers are."""
        self.rng = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            self.rng["cuda"] = torch.cuda.get_rng_state(device)

    @contextlib.contextmanager
    def own_random(self, device: torch.device) -> Iterator[None]:
        """Run with the random numbers of this run; the caller's come back afterwards."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if self.rng is None:
                torch.manual_seed(self.config.seed)
            else:
                torch.set_rng_state(self.rng["cpu"].cpu())
                if device.type == "cuda" and "cuda" in self.rng:
                    torch.cuda.set_rng_state(self.rng["cuda"].cpu(), device)
            yield
