"""Importing the package costs next to nothing, hides nothing, and is told to transformers and torch in any order."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tiny_llama import byte_tokenizer, tiny_llama

import torch_prunepath
from torch_prunepath import SparsifyConfig, sparse_layers, sparsify
from torch_prunepath.on_import import on_import

ROOT = Path(__file__).parents[1]


def run(code: str, *arguments: object, cwd: Path = ROOT / "docs") -> str:
    """The standard output of a Python of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    config = SparsifyConfig(expert_size=4, partition="random", router="centroid", budget="uniform")
    sparsify(tiny_llama(), tau=0.6, config=config, progress=False).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# --- transformers and torch -------------------------------------------------------------------------------------------

LOAD = "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"


@pytest.mark.parametrize(
    "code",
    [
        f"import transformers, torch_prunepath\n{LOAD}",
        f"import torch_prunepath, transformers\n{LOAD}",
        f"import transformers\nfrom transformers import AutoModelForCausalLM\nimport torch_prunepath\n{LOAD}",
        f"import torch, torch_prunepath, transformers\ntorch.ops.prunepath.router_scores\n{LOAD}",
        "import torch_prunepath\nfrom transformers import pipeline\nmodel = pipeline('text-generation', sys.argv[1]).model",  # noqa: E501
        "import torch_prunepath\nfrom transformers.quantizers import auto\nimport transformers\n" + LOAD,
        f"import torch_prunepath.train.compiling, transformers\n{LOAD}",
        f"import torch_prunepath.integrations.transformers, transformers\n{LOAD}",
        "import torch_prunepath.checkpoint\nmodel = torch_prunepath.load(sys.argv[1])",
    ],
    ids=["transformers first", "first", "a class first", "torch first", "pipeline", "quantizers", "a module of ours",
         "the integration", "load"],
)  # fmt: skip
def test_sparse_checkpoints_load_sparse_in_every_order(checkpoint: Path, code: str) -> None:
    """And without touching any attribute of the package."""
    ask = "\nprint(sum(hasattr(module, 'router') for module in model.modules()))"
    assert run(f"import sys\n{code}{ask}", checkpoint).strip() == "2"


def test_without_the_package_the_checkpoint_is_dense(checkpoint: Path) -> None:
    """What makes the test above one that can fail."""
    ask = "print(sum(hasattr(module, 'router') for module in model.modules()))"
    assert run(f"import sys, transformers\n{LOAD}{ask}", checkpoint).strip() == "0"


def test_adapters_first() -> None:
    code = (
        "import torch_prunepath.integrations.peft\n"
        "import torch_prunepath, transformers\n"
        "assert callable(torch_prunepath.sparsify) and callable(torch_prunepath.load)\n"
        "config = transformers.LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, vocab_size=8,"
        " num_attention_heads=1, num_key_value_heads=1)\n"
        "settings = torch_prunepath.SparsifyConfig(partition='random', router='zero', budget='uniform')\n"
        "model = torch_prunepath.sparsify(transformers.LlamaForCausalLM(config), config=settings, progress=False)\n"
        "print(len(torch_prunepath.sparse_layers(model)))"
    )
    assert run(code).strip() == "1"


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    run("import sys, torch_prunepath; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


# --- on_import --------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that nobody has imported yet, and that may be told to fail."""
    (tmp_path / "not_imported_yet.py").write_text("import builtins\nbuiltins.fail_if_wanted()\nx = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.fail_if_wanted", lambda: None, raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "not_imported_yet"  # type: ignore[misc]
    sys.modules.pop("not_imported_yet", None)


def test_on_import_waits_for_the_import_and_goes_away(module: str) -> None:
    seen: list[int] = []
    before = list(sys.meta_path)
    on_import(module, lambda: seen.append(sys.modules[module].x))
    assert importlib.util.find_spec(module) is not None and not seen, "looking is no import"
    importlib.import_module("json.tool")
    assert not seen
    found = importlib.import_module(module)
    assert seen == [1] and sys.meta_path == before
    assert found.__spec__ is not None and found.__spec__.loader.get_source(module)  # type: ignore[union-attr]
    importlib.reload(found)
    assert seen == [1]
    on_import(module, lambda: seen.append(2))
    assert seen == [1, 2]


def test_on_import_still_waits_after_an_import_that_failed(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("not now")

    seen: list[int] = []
    on_import(module, lambda: seen.append(1))
    with monkeypatch.context() as patch, pytest.raises(ImportError, match="not now"):
        patch.setattr("builtins.fail_if_wanted", fail)
        importlib.import_module(module)
    assert not seen
    importlib.import_module(module)
    assert seen == [1]


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_public_name_is_what_its_module_defines() -> None:
    assert set(torch_prunepath.__all__) == set(torch_prunepath._HOMES) <= set(dir(torch_prunepath))
    for name, home in torch_prunepath._HOMES.items():
        assert getattr(torch_prunepath, name) is getattr(importlib.import_module(f"torch_prunepath.{home}"), name)
        assert not isinstance(getattr(torch_prunepath, name), types.ModuleType)
    for room in torch_prunepath._ROOMS:
        assert getattr(torch_prunepath, room) is sys.modules[f"torch_prunepath.{room}"]
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        _ = torch_prunepath.magic
    with pytest.raises(ImportError, match="magic"):
        exec("from torch_prunepath import magic")


def test_no_module_hides_a_public_name() -> None:
    """Importing a module sets an attribute of its package: it would take a lazy name's place."""
    assert not {path.stem for path in (ROOT / "torch_prunepath").iterdir()} & set(torch_prunepath.__all__)


def test_type_checkers_see_what_is_imported() -> None:
    tree = ast.parse((ROOT / "torch_prunepath" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {
        alias.name: str(node.module).removeprefix("torch_prunepath.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == torch_prunepath._HOMES


def test_star() -> None:
    names: dict[str, object] = {}
    exec("from torch_prunepath import *", names)
    assert set(torch_prunepath.__all__) <= set(names)


def test_what_is_public_can_be_pickled() -> None:
    for thing in (torch_prunepath.sparsify, torch_prunepath.SparsifyConfig(seed=3), torch_prunepath.Routing):
        assert pickle.loads(pickle.dumps(thing)) == thing
    model = sparsify(
        tiny_llama(),
        config=SparsifyConfig(partition="random", router="zero", budget="uniform"),
        progress=False,
    )
    assert len(sparse_layers(pickle.loads(pickle.dumps(model)))) == 2


# --- help -------------------------------------------------------------------------------------------------------------

COMMANDS = ["", "quickstart", "sparsify", "info", "train", "sweep", "bench", "bench ffn", "bench decode"]


def test_help_imports_nothing_heavy() -> None:
    """The commands one after the other in one process: each help ends with an exit, and none may load torch."""
    code = (
        "import contextlib, io, json, sys\n"
        "from torch_prunepath.commands.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:\n"
        "        main([*command.split(), '--help'])\n"
        "    assert 'usage: prunepath' in told.getvalue(), command\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'tqdm', 'safetensors'} & set(sys.modules)\n"
        "    assert not heavy, (command, heavy)\n"
    )
    run(code, json.dumps(COMMANDS))


def test_python_m() -> None:
    for options in (["--version"], ["--help"]):
        ended = subprocess.run(
            [sys.executable, "-m", "torch_prunepath", *options], capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert "prunepath" in ended.stdout
    ended = subprocess.run([sys.executable, "-m", "torch_prunepath"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "usage: prunepath" in ended.stderr
