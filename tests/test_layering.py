"""Imports go one way: each module of the package uses only those above it in this list."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "torch_prunepath"
APART = {name: PACKAGE.parent / name for name in ("csrc_triton", "integrations")}

ORDER = [
    "activations",
    "config",
    "limits",
    "rms",
    "select",
    "ffn",
    "reference",
    "linears",
    "probe",
    "trial",
    "discover",
    "cluster",
    "partition",
    "cpu_select",
    "cpu_packs",
    "cpu_dense",
    "cpu_rows",
    "cpu",
    "csrc_triton.jit",
    "csrc_triton.order",
    "csrc_triton.router",
    "csrc_triton.rank",
    "csrc_triton.select",
    "csrc_triton.up",
    "csrc_triton.down",
    "csrc_triton.linear",
    "csrc_triton.masked",
    "csrc_triton.ffn",
    "csrc_triton.divergence",
    "ops",
    "router",
    "fused",
    "compile.graph",
    "compile.inline",
    "compile.linears",
    "compile.decoding",
    "compile.passes",
    "compile.backend",
    "projections",
    "layer",
    "swap",
    "rules",
    "wrapped",
    "data",
    "calibrate",
    "manifest",
    "sparsity",
    "budget",
    "planning",
    "sparsify",
    "refit",
    "card",
    "integrations.transformers",
    "checkpoint",
    "tally",
    "train.schedule",
    "train.config",
    "train.recipes",
    "train.controller",
    "train.shard",
    "train.compiling",
    "train.tape",
    "train.losses",
    "train.targets",
    "train.batches",
    "train.optimizer",
    "train.state",
    "train.terms",
    "integrations.peft_config",
    "integrations.peft_layer",
    "integrations.peft_build",
    "integrations.peft_state",
    "integrations.peft",
    "integrations.torchao",
    "train.objective",
    "train.loop",
    "train.arguments",
    "train.trainer",
    "baselines.routers",
    "baselines.routed",
    "baselines.top_k",
    "baselines.sigmoid",
    "baselines.dynamic_k",
    "baselines.released",
    "baselines.dense",
    "baselines.hoyer",
    "baselines.widths",
    "baselines.pruning",
    "baselines.quantiles",
    "baselines.teal_search",
    "baselines.thresholds",
    "errors",
    "settings",
    "output",
    "corpus",
    "models",
    "evaluate",
    "report",
    "convert",
    "train.material",
    "train.plan",
    "train.stages",
    "train.job",
    "train.command",
    "onthefly",
    "harness",
    "integrations.lm_eval",
    "sweep.scores",
    "sweep.options",
    "sweep.plot",
    "sweep.run",
    "sweep.command",
    "quickstart",
    "bench.geometry",
    "bench.options",
    "bench.floor",
    "bench.timing",
    "bench.layers",
    "bench.gate",
    "bench.sources",
    "bench.results",
    "bench.ffn",
    "bench.decoder",
    "bench.profile",
    "bench.sides",
    "bench.wholes",
    "bench.build",
    "bench.requests",
    "bench.decode",
    "cli",
]


def path_of(module: str) -> Path:
    root, _, rest = module.partition(".")
    if root in APART:
        return APART[root] / f"{rest}.py"
    return (PACKAGE / module.replace(".", "/")).with_suffix(".py")


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch_prunepath":
            rest = node.module.split(".")[1:]
            # "from torch_prunepath.bench import ffn" imports the module bench.ffn.
            whole = not rest or (PACKAGE.joinpath(*rest)).is_dir()
            found |= {".".join([*rest, a.name]) for a in node.names} if whole else {".".join(rest)}
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("torch_prunepath.") for a in node.names if a.name.startswith("torch_prunepath.")
            }
    return found


def test_the_list_is_complete() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    present = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files}
    for name, folder in APART.items():
        present |= {f"{name}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"}
    assert present == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_only_from_above(module: str) -> None:
    above = set(ORDER[: ORDER.index(module)])
    assert imported(path_of(module)) <= above


def test_importing_the_package_is_lean() -> None:
    """No CUDA context, no kernels, no optional dependency."""
    code = (
        "import sys, torch, torch_prunepath\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'peft', 'lm_eval', 'matplotlib', 'gguf', 'torch._inductor'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent / "docs")
