"""Tokens a second of training: dense fine-tuning against this library's loop with the losses of its recipes.

    python -m benchmarks training --model smollm2-135m --device cuda --bf16
    python -m benchmarks training --model smollm2-135m --sides dense held --modes eager --profile profile.txt

Every side trains the same sizes on the same random tokens with AdamW, gradients clipped. "dense" is a plain loop of
its own, with PyTorch's fused AdamW on CUDA; the others are ``torch_prunepath.train.train``: "task" with the model's own
loss alone, "held" and "paper" with those recipes' losses, "held-distil" with the dense model as a teacher as well. In
the modes "default" and "reduce-overhead" of torch.compile, all are compiled block by block; in mode "whole", dense as
one and the others block by block, in the default mode. The clock runs on the device, from the end of one step to the
end of the next; medians after a warm-up.
Weights of a geometry are random, and so are the routers. Memory is the most that tensors held during training.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness.jobs import check_positive
from benchmarks.harness.options import check_device, dispatch, parser_of
from torch_prunepath import SparsifyConfig, sparse_layers, sparsify
from torch_prunepath.bench.geometry import GEOMETRIES, Geometry, resolve
from torch_prunepath.bench.layers import SCORE_SPREAD
from torch_prunepath.bench.results import commit
from torch_prunepath.bench.timing import peak_memory
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.report import aligned, machine
from torch_prunepath.evaluation.models import load_model, longest_context
from torch_prunepath.train import TrainConfig, compiled_blocks, recipes, train

DENSE = "dense"
SIDES = (DENSE, "task", "held", "held-distil", "paper")
MODES = ("eager", "default", "reduce-overhead", "whole")
PROFILED = 3
"""Which step is profiled: those before it load kernels and settle allocations."""
Row = dict[str, Any]
Tick = Callable[[], None]


class Clock:
    """Notes when steps end: on CUDA when the device has done them, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._marks = device, []

    def tick(self) -> None:
        """A step has been queued (CUDA) or done."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Between one tick and the next."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in pairs]
        return [(second - first) * 1e3 for first, second in pairs]


def build(name: str, layers: int | None, device: str, seed: int) -> Any:
    """The dense model in float32 on its device; of random weights if ``name`` is a geometry.

    Raises:
        UserError: if it cannot be had.
    """
    from transformers import AutoModelForCausalLM

    found = resolve(name)
    if isinstance(found, Geometry):
        torch.manual_seed(seed)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(found.config(layers), attn_implementation="sdpa").eval()
    if layers is not None:
        raise UserError(f"--layers shortens geometries, not models in folders ({name}): leave it out")
    return load_model(name)[0].float().to(device)


@torch.no_grad()
def make_sparse(model: Any, side: str, expert_size: int, seed: int) -> None:
    """Experts of neighbouring neurons and random routers, in place: what is chosen does not matter to the clock."""
    released = {"rule": "below", "gate": "sigmoid"} if side == "paper" else {}
    config = SparsifyConfig(
        expert_size=expert_size,
        partition="contiguous",
        router="zero",
        budget="uniform",
        **released,  # type: ignore[arg-type]
    )
    sparsify(model, tau=1.0, config=config, progress=False)
    generator = torch.Generator(model.device).manual_seed(seed)
    for layer in sparse_layers(model).values():
        layer.router.weight.normal_(0.0, SCORE_SPREAD / layer.ffn.hidden_size**0.5, generator=generator)


def config_of(side: str, steps: int, sparsity: float, bf16: bool) -> TrainConfig:
    """The recipe that a side trains with; every one of them holds ``sparsity``."""
    held = recipes.held(steps, sparsity, distil=1.0 if side == "held-distil" else 0.0)
    held = dataclasses.replace(held, phases=held.phases[-1:], autocast=bf16)
    if side == "task":
        return dataclasses.replace(held, contribution_fit=0.0)
    if side == "paper":
        paper = recipes.paper()
        return dataclasses.replace(
            held, contribution_fit=0.0, entropy=paper.entropy, load_balance=paper.load_balance, lr=paper.lr
        )
    return held


def train_densely(model: Any, batches: list[dict[str, Tensor]], config: TrainConfig, tick: Tick) -> None:
    """Dense fine-tuning as one would write it."""
    steps = config.steps
    assert steps is not None
    fused = True if model.device.type == "cuda" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    autocast = torch.autocast(model.device.type, torch.bfloat16) if config.autocast else contextlib.nullcontext()
    model.train()
    for step in range(steps):
        ids_BC = batches[step % len(batches)]["input_ids"].to(model.device, non_blocking=True)
        with autocast:
            loss = model(input_ids=ids_BC, labels=ids_BC, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick()
    model.eval()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the dense model's loss is {loss.item()}")


class Side:
    """One model that trains, and how.

    Args:
        dense: copied; weights stay as they are.
        name: among ``SIDES``.
        mode: among ``MODES``.
        arguments: the command line.
    """

    def __init__(self, dense: Any, name: str, mode: str, arguments: argparse.Namespace) -> None:
        self.name, self.mode, self.arguments = name, mode, arguments
        self.teacher = copy.deepcopy(dense).requires_grad_(False) if name == "held-distil" else None
        self.model = copy.deepcopy(dense)
        if name != DENSE:
            make_sparse(self.model, name, arguments.expert_size, arguments.seed)

    def run(self, batches: list[dict[str, Tensor]], steps: int, tick: Tick) -> None:
        """Train for some steps."""
        config = config_of(self.name, steps, self.arguments.sparsity, self.arguments.bf16)
        if self.name == DENSE:
            train_densely(self.model, batches, config, tick)
            return
        extras = {"teacher": self.teacher, "compile": self.how, "progress": False}
        train(self.model, batches, config, callback=lambda *_: tick(), **extras)

    @property
    def how(self) -> str | bool:
        """What blocks are compiled with."""
        if self.mode == "eager":
            return False
        return self.arguments.backend or (True if self.mode == "whole" else self.mode)

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """A dense model is compiled inside the context, if that is the mode; sparse ones do it themselves."""
        if self.name != DENSE or self.mode == "eager":
            yield
        elif self.mode != "whole":
            with compiled_blocks(self.model, self.how):
                yield
        else:
            self.model.compile(backend=self.arguments.backend or "inductor")
            yield
            self.model._compiled_call_impl = None

    def measure(self, batches: list[dict[str, Tensor]]) -> Row:
        """A row of the table."""
        a, device = self.arguments, self.model.device
        clock = Clock(device)
        with self.prepared(), peak_memory(device) as peak:
            self.run(batches, a.warmup + a.steps + 2, clock.tick)
        # The loop hands out its last two records together.
        times = clock.intervals_ms()[a.warmup : -1]
        median = statistics.median(times)
        return {
            "side": self.name,
            "mode": self.mode,
            "step_ms": round(median, 4),
            "least_ms": round(min(times), 4),
            "tokens_per_second": round(a.rows * a.context / median * 1e3, 1),
            **peak.row(),
        }

    def profile(self, batches: list[dict[str, Tensor]]) -> str:
        """Where the time of one step goes: a table of operators."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        cuda = self.model.device.type == "cuda"
        if cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=PROFILED - 1, warmup=1, active=1, repeat=1)
        with self.prepared():
            with torch.profiler.profile(activities=activities, schedule=schedule, record_shapes=True) as profiler:
                self.run(batches, PROFILED + 3, profiler.step)
            order = "self_device_time_total" if cuda else "self_cpu_time_total"
            return profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=80)


def render(results: dict[str, Any]) -> str:
    """The results as people read them."""
    hardware, arguments = results["hardware"], results["arguments"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    precision = "bfloat16 autocast" if arguments["bf16"] else "float32"
    lines = [
        f"{hardware.get('gpu') or hardware['cpu']}; {versions}; commit {results['commit']}",
        f"{arguments['model']}, {arguments['rows']} x {arguments['context']} tokens a step, {precision}, "
        f"sparsity {arguments['sparsity']:.0%}, experts of {arguments['expert_size']}",
        "",
    ]
    dense = {row["mode"]: row["step_ms"] for row in results["rows"] if row["side"] == DENSE}
    cells: list[tuple[str, ...]] = [("", "mode", "step ms", "least", "tokens/s", "of dense", "peak GB")]
    for row in results["rows"]:
        ratio = f"{row['step_ms'] / dense[row['mode']]:.2f}x" if row["mode"] in dense else ""
        peak = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        times = f"{row['step_ms']:.2f}", f"{row['least_ms']:.2f}"
        cells.append((row["side"], row["mode"], *times, f"{row['tokens_per_second']:,.0f}", ratio, peak))
    return "\n".join([*lines, *aligned(cells)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = parser_of("training", __doc__)
    add = found.add_argument
    add("--model", default="smollm2-135m", help=f"folder of a causal language model, or {', '.join(GEOMETRIES)}")
    add("--layers", type=int, help="shorten a geometry")
    add("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    add("--modes", nargs="+", default=list(MODES[:3]), choices=MODES)
    add("--context", type=int, default=512, help="tokens a window (default: 512)")
    add("--rows", type=int, default=32, help="windows a step (default: 32)")
    add("--sparsity", type=float, default=0.7, help="that is held (default: 0.7)")
    add("--expert-size", type=int, default=SparsifyConfig().expert_size)
    add("--warmup", type=int, default=5, help="steps that are not timed (default: 5)")
    add("--steps", type=int, default=20, help="steps that are (default: 20)")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", help="of torch.compile, in place of Inductor in the mode")
    add("--seed", type=int, default=0)
    add("--profile", type=Path, metavar="FILE", help="write where the time of one step goes, for every side and mode")
    add("--commit", help="what the results say they were made from (default: git's answer)")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    return found


def check(arguments: argparse.Namespace) -> None:
    """Refuse before anything heavy runs.

    Raises:
        UserError: with a remedy.
    """
    check_positive({name: getattr(arguments, name) for name in ("layers", "context", "rows", "expert_size", "steps")})
    if arguments.warmup < 0:
        raise UserError(f"--warmup {arguments.warmup} must not be negative")
    if arguments.context < 2:
        raise UserError("--context 1 leaves nothing to predict: give at least 2")
    if not 0.0 <= arguments.sparsity < 1.0:
        raise UserError(f"--sparsity {arguments.sparsity} is outside [0, 1): 0.8 leaves a fifth of the neurons")
    check_device(arguments.device)


def measure(arguments: argparse.Namespace, command_line: str) -> dict[str, Any]:
    """Every side in every mode.

    Raises:
        UserError: if the model cannot be had.
    """
    dense = build(arguments.model, arguments.layers, arguments.device, arguments.seed)
    if arguments.context > longest_context(dense):
        raise UserError(f"--context {arguments.context} is longer than the model's {longest_context(dense)}")
    vocabulary = dense.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.rows, arguments.context)
    batches = [{"input_ids": torch.randint(vocabulary, shape, generator=generator)} for _ in range(4)]
    rows, profiles = [], []
    for mode in arguments.modes:
        for name in tqdm(arguments.sides, desc=mode, unit="side", disable=None):
            side = Side(dense, name, mode, arguments)
            rows.append(side.measure(batches))
            if arguments.profile is not None:
                profiles.append(f"{name}, {mode}\n\n{side.profile(batches)}\n")
            del side
            torch._dynamo.reset()
            if arguments.device.startswith("cuda"):
                torch.cuda.empty_cache()
    if arguments.profile is not None:
        arguments.profile.write_text("\n".join(profiles), encoding="utf-8")
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    about = {"command_line": command_line, **machine(), "commit": arguments.commit or commit(), "arguments": shown}
    return {**about, "rows": rows}


def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Measure; the table as text."""
    check(arguments)
    results = measure(arguments, command_line)
    return json.dumps(results, allow_nan=False) if arguments.json else render(results)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    return dispatch("training", parser(), {"run": run}, argv)
