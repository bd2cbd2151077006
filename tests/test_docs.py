"""The documentation: its examples run, its commands are taken by the real parsers, its reference is complete.

Every ```python and ```pycon block of a page runs, in order, in one namespace and in an empty folder. What pages take
for granted (``name``, ``model``, ``tokenizer``, ``texts`` and a few more) is tiny here. A block after the line
``<!-- not run: REASON -->`` is compiled only.
"""

from __future__ import annotations

import argparse
import dataclasses
import doctest
import importlib.util
import inspect
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lm_eval_tasks import isolate, write_tiny_tasks
from tiny_llama import byte_tokenizer, save_tiny_llama, tiny_llama

import torch_prunepath
from torch_prunepath import SparsifyConfig, sparse_layers, sparsify
from torch_prunepath.commands import cli
from torch_prunepath.train import TrainConfig, recipes
from torch_prunepath.train.config import LOSSES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "adapters.md": "integrations/test_peft_docs.py",
    "first-hour.md": "integrations/test_first_hour.py",
    "transformers.md": "integrations/test_transformers_docs.py",
}
"""Pages whose examples another test runs."""

BLOCK = re.compile(
    r"(?P<skip>^<!-- not run: [^\n]+ -->\n\n?)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
CODE = ("python", "pycon")
DOCTEST = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is that of its first line of code, from 1."""

    language: str
    code: str
    line: int
    runs: bool


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, not found["skip"])
        for found in BLOCK.finditer(text)
    ]


def has_examples(page: str) -> bool:
    return page not in ELSEWHERE and any(block.language in CODE for block in blocks_of(DOCS / page))


PAGES = sorted(path.name for path in DOCS.glob("*.md"))
EXAMPLES = [page for page in PAGES if has_examples(page)]
TEXTS = [f"{'abcdefghij' * i} is a text, and {i} is its number." for i in range(1, 7)]


# --- examples ---------------------------------------------------------------------------------------------------------


def sparse_model() -> Any:
    config = SparsifyConfig(expert_size=4, partition="kmeans", router="centroid", budget="uniform")
    return sparsify(tiny_llama(), tau=0.7, config=config, progress=False)


def names_for(page: str, folder: Path) -> dict[str, Any]:
    """What the pages take for granted."""
    sparse = page in ("checkpoints.md", "choosing-tau.md", "compiling.md", "evaluating.md")
    tokenizer = byte_tokenizer()
    return {
        "__name__": page,
        "name": str(save_tiny_llama(folder / "base")),
        "model": sparse_model() if sparse else tiny_llama(),
        "tokenizer": tokenizer,
        "texts": list(TEXTS),
        "inputs": tokenizer(TEXTS[0], return_tensors="pt"),
        "torch": torch,
    }


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, no network, one process that torch.distributed can call a group, local tasks for lm-eval."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch._dynamo.reset()


def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts it. Not for pages that do not ask for it: accelerate looks at these variables as well."""
    start = torch.distributed.init_process_group
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: start("gloo", rank=0, world_size=1))


def local_tasks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """lm-eval's own tasks need a network: whatever task a page names, a local one is run."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    isolate(monkeypatch, folder / "datasets")
    manager = TaskManager(include_path=str(write_tiny_tasks(folder / "tasks")), include_defaults=False)
    evaluate = lm_eval.simple_evaluate

    def stand_in(*, model: Any, tasks: list[str]) -> Any:
        assert tasks
        return evaluate(model=model, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0)

    monkeypatch.setattr(lm_eval, "simple_evaluate", stand_in)


def execute(block: Block, page: str, names: dict[str, Any]) -> None:
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + block.code, str(DOCS / page), "exec")
        if block.runs:
            exec(code, names)
        return
    test = doctest.DocTestParser().get_doctest(block.code, names, page, str(DOCS / page), block.line - 1)
    test.globs = names  # the parser copies it; later blocks shall see what this one defines
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=DOCTEST).run(test, out=told.append, clear_globs=False)
    assert result.attempted and not result.failed, "".join(told)


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples(page: str, surroundings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_process(monkeypatch)
    if page == "evaluating.md":
        local_tasks(monkeypatch, surroundings)
    torch.manual_seed(0)
    names = names_for(page, surroundings)
    for block in blocks_of(DOCS / page):
        if block.language in CODE:
            execute(block, page, names)
    if page in EXPECTED:
        EXPECTED[page](names)


def _quickstart(names: dict[str, Any]) -> None:
    assert (Path("sparse-model") / "tokenizer.json").is_file()
    assert len(sparse_layers(names["model"])) == 2
    assert 0.0 < names["record"].sparsity < 1.0


def _training(names: dict[str, Any]) -> None:
    assert {path.name for path in Path().iterdir()} >= {"half", "state.pt", "out", "trained"}
    assert abs(names["records"][-1]["sparsity"] - 0.5) < 0.15
    assert names["state"].step == 20


def _checkpoints(names: dict[str, Any]) -> None:
    assert {path.name for path in Path().iterdir()} >= {"sparse-model", "sparser", "dense-model"}
    with pytest.raises(ValueError, match="holds no sparse FFN"):
        sparse_layers(torch_prunepath.load("sparser") and names["model"])


def _compiling(names: dict[str, Any]) -> None:
    with torch.no_grad():
        compiled = names["model"](**names["inputs"]).logits
        torch.testing.assert_close(compiled, names["model"]._orig_mod(**names["inputs"]).logits, rtol=1e-3, atol=1e-3)


EXPECTED: dict[str, Callable[[dict[str, Any]], None]] = {
    "quickstart.md": _quickstart,
    "training.md": _training,
    "checkpoints.md": _checkpoints,
    "compiling.md": _compiling,
}
"""What has to be there when a page's examples have run."""


def test_every_page_with_examples_is_run() -> None:
    assert all((ROOT / "tests" / test).is_file() for test in ELSEWHERE.values())
    wanted = {"quickstart.md", "how-it-works.md", "choosing-tau.md", "training.md", "compiling.md", "evaluating.md"}
    assert set(EXAMPLES) >= wanted | {"checkpoints.md", "adding-an-ffn.md", "index.md"}


def test_a_wrong_example_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nx = 1\n```\n\n```pycon\n>>> x\n2\n```\n\n```python\nraise KeyError(x)\n```\n")
    good, wrong, raises = blocks_of(page)
    assert (good.line, wrong.line, raises.line) == (4, 8, 13)
    names: dict[str, Any] = {}
    execute(good, str(page), names)
    with pytest.raises(AssertionError, match="Expected"):
        execute(wrong, str(page), names)
    with pytest.raises(KeyError):
        execute(raises, str(page), names)
    page.write_text("<!-- not run: raises -->\n" + page.read_text().rpartition("\n\n")[2])
    (skipped,) = blocks_of(page)
    execute(skipped, str(page), names)
    with pytest.raises(SyntaxError):
        execute(dataclasses.replace(skipped, code="x ="), str(page), names)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_in(path: Path) -> list[list[str]]:
    """The commands of a file's shell blocks whose program is one of ours, as words."""
    found = []
    for block in blocks_of(path):
        if block.language not in ("bash", "console", "sh"):
            continue
        code = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", block.code)  # a shell's variable with a default stands for that
        for line in code.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words and Path(words[0]).name in ("prunepath", "prunepath-eval"):
                    found.append([Path(words[0]).name, *words[1:]])
    return found


def eval_parser() -> argparse.ArgumentParser:
    """The parser of ``lm-eval run``, which is what ``prunepath-eval`` runs."""
    from lm_eval._cli import HarnessCLI

    return HarnessCLI()._subparsers.choices["run"]  # type: ignore[no-any-return]


FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / page for page in PAGES)]
COMMANDS = [(path.name, command) for path in FILES for command in commands_in(path)]


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{where}-{i}" for i, (where, _) in enumerate(COMMANDS)])
def test_commands_are_taken(where: str, words: list[str]) -> None:
    program, *rest = words
    parser = eval_parser() if program == "prunepath-eval" else cli._parser()
    try:
        found = parser.parse_args(rest)
    except SystemExit:
        pytest.fail(f"{where}: the parser refuses {shlex.join(words)}")
    if program == "prunepath-eval":
        given = found.model_args
        given = given if isinstance(given, dict) else dict(pair.split("=", 1) for pair in given.split(","))
        assert given.keys() <= model_arguments(), where


def model_arguments() -> set[str]:
    from torch_prunepath.integrations.lm_eval import PrunePathLM

    parameters = [p for cls in PrunePathLM.__mro__[:2] for p in inspect.signature(cls.__init__).parameters]
    return {*parameters, *(field.name for field in dataclasses.fields(SparsifyConfig))}


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_options_named_in_the_text_exist(path: Path) -> None:
    known = {option for parser in parsers(cli._parser()) for option in parser._option_string_actions}
    known |= set(eval_parser()._option_string_actions)
    if path.name == "reproducing.md":
        from benchmarks.presets import command, figure3

        known |= set(command.parser(figure3.PRESET)._option_string_actions)
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for span in SPAN.findall(text):
        words = span.replace("\\|", " ").replace("[", " ").replace("]", " ").split()
        if words[:1] == ["prunepath"] or words[:1] == ["prunepath-eval"] or span.startswith("--"):
            unknown = [word for word in words if word.startswith("-") and word not in known]
            assert not unknown, f"{path.name}: {span}"
        if words[:1] == ["prunepath"] and len(words) > 1:
            commands = [parser.prog.removeprefix("prunepath ") for parser in parsers(cli._parser())]
            assert any(" ".join(words[1:]).startswith(command) for command in commands), f"{path.name}: {span}"


def test_there_are_commands_to_check() -> None:
    assert {words[0] for _, words in COMMANDS} == {"prunepath", "prunepath-eval"}
    assert {words[1] for _, words in COMMANDS if words[0] == "prunepath"} >= {
        "quickstart", "sparsify", "info", "train", "sweep", "bench"
    }  # fmt: skip


# --- what tables say --------------------------------------------------------------------------------------------------


def rows_of(page: str) -> list[list[str]]:
    """Cells of every table row of a page."""
    lines = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_objective_s_table_has_the_defaults() -> None:
    config, ours = TrainConfig(steps=1), recipes.ours(1)
    weights = {row[0].strip("`"): row[2] for row in rows_of("training.md") if len(row) == 3 and row[0].startswith("`")}
    assert weights.keys() == set(LOSSES)
    for name, said in weights.items():
        assert float(said.split(";")[0]) == getattr(config, name), name
    assert f"`ours` and `held`: {ours.contribution_fit:g}" in weights["contribution_fit"]
    assert recipes.held(1, 0.5).contribution_fit == ours.contribution_fit
    assert float(weights["entropy"].rpartition(" ")[2]) == recipes.paper().entropy
    assert float(weights["load_balance"].rpartition(" ")[2]) == recipes.paper().load_balance


RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("first", ["routed", "the best static", "the same experts"])
def test_perplexities_stand_in_the_results(first: str) -> None:
    (row,) = [row for row in rows_of("choosing-tau.md") if row[0].startswith(first)]
    assert len(row) == 6
    assert " | ".join(row[1:]) in (RESULTS / "quality-smollm2-135m.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("first", "results", "start"),
    [
        ("FFN of qwen2-7b", "ffn-h100.md", "| qwen2-7b | 64 | 1 |"),
        ("FFN of gpt2-medium", "ffn-h100.md", "| gpt2-medium | 32 | 1 |"),
        ("all of qwen2-7b", "decode-h100.md", "| qwen2-7b | 64 |"),
        ("all of gpt2-medium", "decode-h100.md", "| gpt2-medium | 32 |"),
    ],
)
def test_speed_ups_stand_in_the_results(first: str, results: str, start: str) -> None:
    (row,) = [row for row in rows_of("choosing-tau.md") if row[0].startswith(first)]
    kept = [line for line in (RESULTS / results).read_text(encoding="utf-8").splitlines() if line.startswith(start)]
    sparsities = [float(re.findall(r"([\d.]+)% \|", line)[0]) for line in kept]
    for share, said in zip((50, 80, 90), row[1:], strict=True):
        (line,) = [line for line, sparsity in zip(kept, sparsities, strict=True) if abs(sparsity - share) < 0.5]
        assert f"**{said}**" in line


def test_commits_beside_numbers_are_those_of_the_results() -> None:
    kept = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *RESULTS.glob("*.md")])
    for page in ("choosing-tau.md", "limits.md", "quickstart.md"):
        named = re.findall(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7}\b", (DOCS / page).read_text(encoding="utf-8"))
        assert named and all(commit in kept for commit in named), page


def test_the_quick_start_s_table_is_the_readme_s() -> None:
    (table,) = [block.code for block in blocks_of(DOCS / "quickstart.md") if block.language == "text"]
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_passes_names_them_all() -> None:
    from torch_prunepath.compile.passes import PASSES

    assert set(PASSES) <= {row[0].strip("`") for row in rows_of("compiling.md")}


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_reference", DOCS / "hooks" / "api_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(hook: ModuleType) -> str:
    return hook.on_page_markdown((DOCS / "api.md").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("module", ["", ".train", ".baselines", ".integrations.peft"])
def test_reference_holds_every_public_name(reference: str, module: str) -> None:
    found = importlib.import_module(f"torch_prunepath{module}")
    assert len(found.__all__) > 1
    for name in found.__all__:
        thing = getattr(found, name)
        after = reference.partition(f'<a id="torch_prunepath{module}.{name}"></a>')[2]
        assert after.startswith(f"\n\n### {name}\n"), f"{module}.{name}"
        doc = inspect.getdoc(thing)
        assert doc, f"torch_prunepath{module}.{name} has no docstring"
        first = re.sub(r":\w+:(`[^`]+`)", r"\1", doc.splitlines()[0])
        assert first in after[: after.find("<a id=") if "<a id=" in after else None]


def test_reference_has_no_rest_left(reference: str) -> None:
    assert not re.search(r":(func|class|meth|mod|data|attr):`", reference)
    assert "<!-- api:" not in reference
    assert not re.search(r"^(Args|Returns|Raises|Attributes|Examples?)::?$", reference, flags=re.MULTILINE)


def test_signatures_in_the_reference_are_the_real_ones(hook: ModuleType) -> None:
    for name in ("sparsify", "set_tau", "set_sparsity", "record_sparsity"):
        node, _ = hook.find("torch_prunepath", name)
        written = hook.signature(node, name)
        for parameter in inspect.signature(getattr(torch_prunepath, name)).parameters.values():
            default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
            assert re.search(rf"\b{parameter.name}: [^,\n]+(\[[^\n]*\])?{re.escape(default)}[,)\n]", written), written
