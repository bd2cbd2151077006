"""Times the loss of distillation, gradient included: one kernel against torch's operators, as they are and compiled.

    python -m benchmarks distillation --tokens 16384 --vocabulary 49152

Every way is compared with float64 before the clock runs. The floor is what three tensors of logits take at the copy's
bandwidth: student and teacher read once, the gradient written. On a CPU there is no kernel to time.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.jobs import check_positive
from benchmarks.harness.options import dispatch, parser_of
from torch_prunepath.bench.results import commit
from torch_prunepath.bench.timing import copy_bandwidth, ready, timed
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.report import aligned, machine
from torch_prunepath.train import losses

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Of a gradient's error, relative to its largest element."""
CHECKED = 64
"""Tokens that are compared with float64."""
CUDA_CHUNK = 1024
"""Tokens at a time for operators on CUDA, where a default that suits a CPU's caches would be all launches."""
Way = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]


def ways(device: str, chunk: int | None, tokens: int) -> dict[str, Way]:
    """Loss and gradient of student and teacher logits, each token's share, a temperature; the last asks for both."""
    if device != "cuda":
        kernel: dict[str, Way] = {}
    else:
        from torch_prunepath.csrc_triton.divergence import divergence

        chunk, kernel = chunk or CUDA_CHUNK, {"kernel": divergence}

    def at_once(*given: Any) -> tuple[Tensor, Tensor | None]:
        return losses.by_chunks(*given, chunk=tokens)

    operators = functools.partial(losses.by_chunks, chunk=chunk)
    return {"operators": operators, "compiled": torch.compile(at_once, dynamic=False), **kernel}


def check(name: str, way: Way, given: Sequence[Tensor]) -> None:
    """Compare a way's gradient of some tokens with float64's.

    Raises:
        UserError: if it is wrong.
    """
    some = [value[:CHECKED] for value in given]
    exact_TV = losses.by_chunks(*(value.double() for value in some), 1.0, True)[1]
    found_TV = way(*some, 1.0, True)[1]
    assert exact_TV is not None and found_TV is not None
    error = float((found_TV.double() - exact_TV).abs().max() / exact_TV.abs().max())
    if not error <= BOUNDS[given[0].dtype]:
        raise UserError(f"{name}: the gradient is off by {error:.1e} of its largest element; nothing was timed")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of ways, milliseconds each.

    Raises:
        UserError: if numbers are not positive, there is no device, or a way is wrong.
    """
    check_positive({name: getattr(arguments, name) for name in ("tokens", "vocabulary", "chunk", "seconds")})
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device: give --device cpu")
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    shape = arguments.tokens, arguments.vocabulary
    student_TV, teacher_TV = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    given = student_TV, teacher_TV, torch.full(shape[:1], 1.0 / shape[0], device=device)
    found = ways(arguments.device, arguments.chunk, arguments.tokens)
    for name, way in found.items():
        check(name, way, given)
    calls = {name: ready(lambda way=way: way(*given, 1.0, True), device) for name, way in found.items()}
    times = timed(calls, device, calls=1, seconds=arguments.seconds)
    rows = [{"way": name, "ms": times[name].median_us / 1e3, "least_ms": times[name].min_us / 1e3} for name in found]
    floor_ms = 3 * student_TV.nbytes / copy_bandwidth(device) * 1e3
    about = {"tokens": shape[0], "vocabulary": shape[1], "dtype": arguments.dtype, **machine()}
    about["commit"] = arguments.commit or commit()
    return {**about, "floor_ms": floor_ms, "rows": rows}


def run(arguments: argparse.Namespace, command_line: str) -> str:
    """Measure; the table as text."""
    results = {**measure(arguments), "command": command_line}
    if arguments.json:
        return json.dumps(results)
    floor_ms = results["floor_ms"]
    head = f"{results['tokens']} x {results['vocabulary']} logits in {results['dtype']}, floor {floor_ms:.2f} ms"
    lines = [("way", "ms", "least", "of floor")]
    for row in results["rows"]:
        lines.append((row["way"], f"{row['ms']:.2f}", f"{row['least_ms']:.2f}", f"{row['ms'] / floor_ms:.1f}x"))
    return "\n".join([head, *aligned(lines)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = parser_of("distillation", __doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    words = f"tokens at a time, by operators (default: {CUDA_CHUNK} on CUDA, what caches hold on a CPU)"
    parser.add_argument("--chunk", type=int, help=words)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long each way is timed")
    parser.add_argument("--commit", help="what the results say they were made from (default: git's answer)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return dispatch("distillation", parser, {"run": run}, argv)
