"""Every class of transformers' AutoModel mappings, built small: is it right, refused in words, or wrong?

    python -m tests.stress.classes --json out.jsonl            # all of them, half an hour on one core
    python -m tests.stress.classes --mapping MODEL_FOR_CAUSAL_LM --only LlamaForCausalLM,opt

Each class runs in a process of its own, so that a crash or a hang is a line of the table. Checked are: tau = 1 against
the dense model, every sparse layer at tau = 0.5 against the reference, saving and loading bit by bit, and that
``densify`` gives the weights back.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import torch_prunepath
from tests.stress.shrink import build, requests
from torch_prunepath.inputs.front import quiet
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.reference import router_scores_reference, sparse_ffn_reference
from torch_prunepath.layer.views import sparse_views
from torch_prunepath.select import select_experts

FIRST = ("MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_CLASSIFICATION")
"""Mappings that come first in a sweep: bodies, and the heads that most people load."""

NO_DATA = torch_prunepath.SparsifyConfig(partition="kmeans", router="centroid", budget="uniform")
TOLERANCE = 1e-4
"""Largest difference from the dense model, as a share of the largest output: float32 sums in another order."""
ROWS = 16
"""Tokens of each layer that are compared with the reference, which is plain Python."""
SECONDS = 60
"""Most processor time for one class: what else the machine does must not change an outcome."""
WALL_SECONDS = 600
"""Most time by the clock for one class, for one that waits and does not compute."""
MEMORY = 6 << 30
"""Most memory for one class, in bytes of address space: a config that does not get small must not end the sweep."""


@dataclass(frozen=True, order=True)
class Entry:
    """One class of a mapping.

    Attributes:
        mapping: name of the mapping, ``MODEL_FOR_CAUSAL_LM``.
        kind: the model type that is its key.
        name: the class.
    """

    mapping: str
    kind: str
    name: str


@dataclass(frozen=True)
class Result:
    """What became of one class.

    Attributes:
        mapping, kind, name: as in :class:`Entry`.
        outcome: ``"right"``, ``"refused"``, ``"not built"`` or ``"wrong"``.
        detail: why; of what is right, how it was built.
        layers: number of sparse layers.
        seconds: processor time taken.
    """

    mapping: str
    kind: str
    name: str
    outcome: str
    detail: str
    layers: int = 0
    seconds: float = 0.0


def entries(mappings: Sequence[str] = ()) -> list[Entry]:
    """Every class once, under the first mapping that has it."""
    names = [name.removesuffix("_MAPPING_NAMES") for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    names = [name for name in names if name.startswith("MODEL")]
    found: dict[str, Entry] = {}
    for mapping in mappings or (*FIRST, *(name for name in names if name not in FIRST)):
        for kind, classes in getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").items():
            for name in [classes] if isinstance(classes, str) else classes:
                found.setdefault(name, Entry(mapping, kind, name))
    return list(found.values())


class Stop(Exception):
    """An exception that ends the checks of one class with an outcome and its reason."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


def check(entry: Entry) -> Result:
    """Build, convert, compare, save, load and densify one class."""
    start = time.process_time()
    layers = 0
    try:
        how, model, inputs = _running(entry)
        original = {key: value.clone() for key, value in model.state_dict().items()}
        dense = answers(model, inputs)
        _convert(model, inputs)
        layers = len(torch_prunepath.sparse_layers(model))
        _compare("tau = 1 is not the dense model", answers(model, inputs), dense, TOLERANCE)
        torch_prunepath.set_tau(model, 0.5)
        _compare_layers(model, inputs)
        _reload(model, inputs)
        _step("densify", lambda: torch_prunepath.densify(model))
        after = model.state_dict()
        if original.keys() != after.keys() or not all(torch.equal(original[k], after[k]) for k in original):
            raise Stop("wrong", "densify does not give the weights back")
        outcome, detail = "right", f"{how}; {', '.join(inputs)}"
    except Stop as stop:
        outcome, detail = stop.outcome, stop.detail
    return Result(entry.mapping, entry.kind, entry.name, outcome, detail, layers, round(time.process_time() - start, 1))


def _running(entry: Entry) -> tuple[str, nn.Module, dict[str, Any]]:
    """A model of the class, and inputs that it takes."""
    try:
        model_class = getattr(transformers, entry.name)
        config_class = getattr(model_class, "config_class", None) or CONFIG_MAPPING[entry.kind]
        failure = None
        for how, model in build(model_class, config_class):
            for inputs in requests(model):
                try:
                    found = answers(model, inputs)
                    if not found:
                        continue
                    if not all(bool(value.isfinite().all()) for value in found):
                        failure = failure or "not finite"
                        continue
                    return how, model, inputs
                except Exception as error:
                    failure = failure or _first_line(error) or repr(inputs.keys())
        raise Stop("not built", f"no inputs found: {failure}")
    except Stop:
        raise
    except Exception as error:
        raise Stop("not built", _first_line(error)) from error


def _convert(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Make the model sparse as a user would, without data where the inputs do not run all of it."""
    try:
        torch_prunepath.sparsify(model, tau=1.0, calibration=inputs, progress=False)
    except ValueError as error:
        if "does not reach" not in str(error) and "too few" not in str(error):
            raise Stop("refused", _first_line(error)) from error
        try:
            torch_prunepath.sparsify(model, tau=1.0, config=NO_DATA, progress=False)
        except ValueError as again:
            raise Stop("refused", _first_line(again)) from again
    except Exception as error:
        raise Stop("wrong", f"sparsify: {_first_line(error)}") from error


def _step(name: str, do: Callable[[], Any]) -> Any:
    try:
        return do()
    except Exception as error:
        raise Stop("wrong", f"{name}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}"


@torch.no_grad()
def answers(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Every floating point tensor that the model answers, whatever it is nested in."""
    torch.manual_seed(0)  # some draw masks or noise
    return list(_tensors(model(**quiet(model, inputs))))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@torch.no_grad()
def _compare(what: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    if len(found) != len(expected):
        raise Stop("wrong", f"{what}: another number of outputs")
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise Stop("wrong", f"{what}: another shape of output")
        error = float((one - other).abs().max()) if one.numel() else 0.0
        size = float(other.abs().max()) if other.numel() else 0.0
        if not error <= tolerance * max(size, 1e-6):
            raise Stop("wrong", f"{what}: they differ by {error:.3g} where outputs are up to {size:.3g}")


def _compare_layers(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Every call of every sparse layer against the reference; copies, because models add to outputs in place."""
    layers, views = torch_prunepath.sparse_layers(model), sparse_views(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():
        last = views[name].down if layer.ffn.split else layer
        handles.append(layer.register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0].clone())))
        handles.append(last.register_forward_hook(lambda _, args, output, n=name: seen[n].append(output.clone())))
    _step("a call with hooks", lambda: answers(model, inputs))
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        for x, y in zip(seen[name][::2], seen[name][1::2], strict=True):
            _compare_call(name, layer, views[name], x, y)


@torch.no_grad()
def _compare_call(name: str, layer: Any, view: FFNView, x: Tensor, y: Tensor) -> None:
    x_TD, y_TD = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    rows = torch.linspace(0, len(x_TD) - 1, min(ROWS, len(x_TD))).long()
    x_TD, y_TD = x_TD[rows].double(), y_TD[rows].double()
    scores_TE = router_scores_reference(x_TD, layer.router.weight, layer.router.bias, layer.router_norm)
    mask_TE = select_experts(scores_TE, float(layer.tau))
    # Where the mass ahead of an expert is this near to tau, rounding decides, and either answer is right.
    near = 1e-5
    taus = (max(float(layer.tau) - near, 1e-30), min(float(layer.tau) + near, 1.0))
    sure_T = (select_experts(scores_TE, taus[0]) == select_experts(scores_TE, taus[1])).all(1)
    expected_TD = sparse_ffn_reference(view, x_TD, mask_TE, None, layer.experts.expert_size)
    _compare(f"{name} at tau = 0.5 is not the reference", [y_TD[sure_T]], [expected_TD[sure_T]], TOLERANCE)


def _reload(model: Any, inputs: dict[str, Any]) -> None:
    before = answers(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        _step("save_pretrained", lambda: model.save_pretrained(folder))
        again = _step("from_pretrained", lambda: type(model).from_pretrained(folder)).eval()
        again_layers = sum(isinstance(m, torch_prunepath.layer.RoutedExperts) for m in again.modules())
        if again_layers != len(torch_prunepath.sparse_layers(model)):
            raise Stop("wrong", f"reload: {again_layers} sparse layers")
        kept, found = model.state_dict(), again.state_dict()
        different = [key for key in kept if key not in found or not torch.equal(kept[key], found[key])]
        if different:
            raise Stop("wrong", f"reload: {len(different)} tensors are not equal bit by bit, the first: {different[0]}")
        taus = [[float(layer.tau) for layer in torch_prunepath.sparse_layers(m).values()] for m in (model, again)]
        if taus[0] != taus[1]:
            raise Stop("wrong", "reload: another tau")
        # Convolutions differ in their last bit by where in memory their weights lie.
        _compare("reload answers otherwise", answers(again, inputs), before, 1e-6)


# --- processes --------------------------------------------------------------------------------------------------------


def _answer(entry: Entry, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe.send(check(entry))


def check_apart(entry: Entry) -> Result:
    """:func:`check` in a process of its own: what crashes or hangs there is an outcome here."""
    # A fork has torch and transformers imported already, and the modules of all classes before it.
    with contextlib.suppress(Exception):  # told by the check
        getattr(transformers, entry.name)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(entry, theirs))
    process.start()
    theirs.close()
    outcome, failed = "wrong", "no answer"
    try:
        if ours.poll(WALL_SECONDS):
            return ours.recv()  # type: ignore[no-any-return]
        outcome, failed = "not built", f"more than {WALL_SECONDS} s by the clock"
    except EOFError:
        process.join()
        failed = f"the process ended with {process.exitcode}"
        if process.exitcode == -signal.SIGXCPU:
            outcome, failed = "not built", f"more than {SECONDS} s of processor time"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
    return Result(entry.mapping, entry.kind, entry.name, outcome, failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, print a table, and return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.classes", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--mapping", action="append", default=[], help="MODEL, MODEL_FOR_CAUSAL_LM, ...; all of them")
    parser.add_argument("--only", default="", help="classes or model types, with commas between")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th class, from the I-th: for N processes")
    parser.add_argument("--json", type=Path, help="a file for one JSON object a class; what it holds is not run again")
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    only = set(filter(None, options.only.split(",")))
    wanted = [each for each in entries(options.mapping) if not only or {each.kind, each.name} & only][part::parts]
    done = read(options.json) if options.json is not None and options.json.exists() else []
    known = {result.name for result in done}
    torch.set_num_threads(1)
    for entry in wanted:
        if entry.name in known:
            continue
        result = check_apart(entry)
        done.append(result)
        print(f"{result.outcome:10} {result.name}: {result.detail} ({result.seconds} s)", flush=True)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    print(table(done))
    return int(any(result.outcome == "wrong" for result in done))


def read(path: Path) -> list[Result]:
    """Results that :func:`main` wrote."""
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def table(results: Sequence[Result]) -> str:
    """Counts of outcomes by mapping, as Markdown."""
    outcomes = ("right", "refused", "not built", "wrong")
    counts = collections.Counter((result.mapping, result.outcome) for result in results)
    lines = ["| mapping | " + " | ".join(outcomes) + " |", "|---" * (1 + len(outcomes)) + "|"]
    mappings = dict.fromkeys(result.mapping for result in results)
    for mapping in mappings:
        lines.append(f"| {mapping} | " + " | ".join(str(counts[mapping, outcome]) for outcome in outcomes) + " |")
    totals = [sum(counts[mapping, outcome] for mapping in mappings) for outcome in outcomes]
    lines.append("| all | " + " | ".join(map(str, totals)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
