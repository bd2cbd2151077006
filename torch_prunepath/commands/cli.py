"""The command line ``prunepath``: what it takes, and which job each command runs.

Nothing heavy is imported before a command is known, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch_prunepath.commands.sweep import command as sweep
from torch_prunepath.commands.train import command as train
from torch_prunepath.console.errors import UserError
from torch_prunepath.console.settings import add_settings, given_settings

TAUS = (0.97, 0.95, 0.9, 0.8, 0.7)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code.

    It is 0, 1 if a benchmark found wrong results, 2 if the person must mend something, or 130 if interrupted.
    """
    arguments = _parser().parse_args(argv)
    arguments.command_line = shlex.join(["prunepath", *(sys.argv[1:] if argv is None else argv)])
    # So that a command that is asked to end still clears away what it has half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        # Standard output is for the result alone, whatever a library prints.
        with contextlib.redirect_stdout(sys.stderr):
            results, text = arguments.job(arguments)
    except KeyboardInterrupt:
        print("prunepath: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        if arguments.debug:
            raise
        print(f"prunepath: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    print(json.dumps(results, allow_nan=False) if arguments.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prunepath", description="Sparse experts with a run-time sparsity knob for pretrained transformers."
    )
    parser.add_argument("--version", action="version", version=f"torch-prunepath {metadata.version('torch-prunepath')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_quickstart(commands)
    _add_sparsify(commands)
    _add_info(commands)
    train.add_arguments(_add_command(commands, "train", train.job, train.SUMMARY))
    sweep.add_arguments(_add_command(commands, "sweep", sweep.job, sweep.SUMMARY))
    _add_bench(commands)
    return parser


def _add_command(commands: Any, name: str, job: Any, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(job=job)
    return command


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to fit and measure on (default: Python's help topics)"
    )


def _add_quickstart(commands: Any) -> None:
    command = _add_command(
        commands, "quickstart", _quickstart, "Sparsify a small model; measure quality and speed; save and reload it."
    )
    command.add_argument("--model", help="name or folder of a causal language model (default: SmolLM2-135M-Instruct)")
    _add_text(command)
    command.add_argument("-o", "--output", type=Path, default=Path("prunepath-quickstart"), help="folder to write")
    command.add_argument(
        "--tau", type=float, nargs="+", default=TAUS, help="thresholds to measure; the checkpoint keeps the middle one"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")


def _quickstart(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from torch_prunepath.commands import quickstart

    options = quickstart.Options(
        model=arguments.model,
        text=arguments.text,
        output=arguments.output,
        taus=arguments.tau,
        seed=arguments.seed,
    )
    results = quickstart.run(options)
    return results, quickstart.render(results)


def _add_sparsify(commands: Any) -> None:
    command = _add_command(commands, "sparsify", _sparsify, "Sparsify a causal language model and save the checkpoint.")
    command.add_argument("model", metavar="MODEL", help="name or folder of a causal language model, or a GGUF file")
    command.add_argument(
        "-o", "--output", type=Path, required=True, help="folder to write; must not exist, or be empty"
    )
    knob = command.add_mutually_exclusive_group()
    knob.add_argument("--tau", type=float, default=0.9, help="threshold in (0, 1] (default: 0.9)")
    knob.add_argument("--sparsity", type=float, help="find the tau that reaches this inactive share of neurons")
    _add_text(command)
    add_settings(command, "")


def _sparsify(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from torch_prunepath.commands import sparsify as convert

    options = convert.Options(
        model=arguments.model,
        text=arguments.text,
        output=arguments.output,
        tau=arguments.tau,
        sparsity=arguments.sparsity,
        settings=given_settings(arguments),
    )
    results = convert.run(options)
    return results, convert.render(results)


def _add_info(commands: Any) -> None:
    command = _add_command(commands, "info", _info, "Describe a sparse checkpoint without loading its weights.")
    command.add_argument("folder", metavar="DIR", type=Path, help="a folder that save_pretrained wrote")


def _info(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from torch_prunepath.commands import sparsify as convert

    results = convert.info(arguments.folder)
    return results, convert.render_info(results)


def _add_bench(commands: Any) -> None:
    summary = "Time dense against sparse, after checking that both compute the right thing."
    bench = commands.add_parser("bench", help=summary, description=summary)
    kinds = bench.add_subparsers(title="benchmarks", required=True, metavar="WHAT")
    _add_bench_options(_add_command(kinds, "ffn", _bench_ffn, "One FFN, layers rotated past the last cache."))
    command = _add_command(kinds, "decode", _bench_decode, "A whole model, compiled, decoding from a static cache.")
    _add_bench_options(command)
    command.add_argument("--context", type=int, default=128, help="tokens in the cache when decoding starts")
    command.add_argument("--new-tokens", type=int, default=64, help="tokens decoded in a timed run")
    modes = "of eager, default, max-autotune, reduce-overhead and, on CUDA, graph, graph-combo, graph-max-autotune"
    command.add_argument("--modes", nargs="+", metavar="MODE", help=f"dense ones, {modes}: the best is the baseline")
    command.add_argument("--sparse-modes", nargs="+", metavar="MODE", help="sparse ones: the best counts")
    command.add_argument("--backend", default="prunepath", help="torch.compile's backend of the sparse model")
    command.add_argument(
        "--prompts", type=int, default=0, metavar="N", help="also measure N prompts of different lengths one by one"
    )
    command.add_argument(
        "--profile", type=Path, metavar="FILE", help="write where one call's time goes: kernels (CUDA), operators (CPU)"
    )


def _add_bench_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--geometry", nargs="+", required=True, metavar="NAME|DIR", help="a known model's sizes, or a model's folder"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    command.add_argument("--batch", type=int, nargs="*", default=[1], help="tokens a call (default: 1)")
    command.add_argument("--prompt", type=int, nargs="*", default=[], help="prompt lengths to read at once")
    command.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95], help="inactive shares"
    )
    command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="(default: bf16)")
    command.add_argument("--expert-size", type=int, default=32, help="neurons an expert (default: 32)")
    command.add_argument("--gate", choices=("one", "sigmoid"), default="one", help="(default: one)")
    command.add_argument("--layers", type=int, help="layers to rotate (ffn), or to build (decode)")
    command.add_argument("--seconds", type=float, default=1.0, help="how long to time each thing (default: 1)")
    command.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    command.add_argument("-o", "--output", type=Path, help="folder for results.json and the plot")


def _bench_options(arguments: argparse.Namespace) -> dict[str, Any]:
    plural = {"geometry": "geometries", "batch": "batches", "prompt": "prompts", "sparsity": "sparsities"}
    same = ("device", "dtype", "expert_size", "gate", "layers", "seconds", "seed", "output", "command_line")
    return {name: getattr(arguments, key) for key, name in plural.items()} | {k: getattr(arguments, k) for k in same}


def _bench_ffn(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from torch_prunepath.bench import ffn, options, results

    found = ffn.run(options.FFNOptions(**_bench_options(arguments)))
    return found, results.render(found)


def _bench_decode(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from torch_prunepath.bench import decode, options, results

    asked = options.DecodeOptions(
        **_bench_options(arguments),
        context=arguments.context,
        new_tokens=arguments.new_tokens,
        modes=arguments.modes,
        sparse_modes=arguments.sparse_modes,
        backend=arguments.backend,
        requests=arguments.prompts,
        profile=arguments.profile,
    )
    found = decode.run(asked)
    return found, results.render(found)
