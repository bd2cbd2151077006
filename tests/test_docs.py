"""The documentation: its examples run, its commands are taken by the real parsers, its reference is complete.

Every ```python and ```pycon block of a page runs, in order, in one namespace and in an empty folder. What pages take
for granted (``name``, ``model``, ``tokenizer``, ``texts`` and a few more) is tiny here; the pages that a newcomer reads
first, the README among them, take nothing for granted, and the model that they name on the hub is a tiny local one. A
block after the line ``<!-- not run: REASON -->`` is compiled only.
"""

from __future__ import annotations

import argparse
import dataclasses
import doctest
import importlib
import inspect
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
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


README = "README.md"


def source(page: str) -> Path:
    return (ROOT if page == README else DOCS) / page


def has_examples(page: str) -> bool:
    return page not in ELSEWHERE and any(block.language in CODE for block in blocks_of(source(page)))


PAGES = sorted(path.name for path in DOCS.glob("*.md"))
EXAMPLES = [page for page in [README, *PAGES] if has_examples(page)]
COMPLETE = (README, "index.md", "quickstart.md")
"""Pages whose code runs as it stands, with nothing defined before it."""
HUB = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
"""What they load; a tiny model in a folder stands for it here, since tests reach no hub."""
TEXTS = [f"{'abcdefghij' * i} is a text, and {i} is its number." for i in range(1, 7)]


# --- examples ---------------------------------------------------------------------------------------------------------


def sparse_model() -> Any:
    config = SparsifyConfig(expert_size=4, partition="kmeans", router="centroid", budget="uniform")
    return sparsify(tiny_llama(), tau=0.7, config=config, progress=False)


def names_for(page: str, folder: Path) -> dict[str, Any]:
    """What the pages take for granted."""
    if page in COMPLETE:
        return {"__name__": page, "FOLDER": str(save_tiny_llama(folder / "base"))}
    sparse = page in ("budgets.md", "checkpoints.md", "choosing-tau.md", "compiling.md", "evaluating.md")
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
        text = block.code.replace(HUB, "FOLDER") if page in COMPLETE else block.code
        code = compile("\n" * (block.line - 1) + text, str(source(page)), "exec")
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
    for block in blocks_of(source(page)):
        if block.language in CODE:
            execute(block, page, names)
    if page in EXPECTED:
        EXPECTED[page](names)


def _quickstart(names: dict[str, Any]) -> None:
    assert names["name"] == names["FOLDER"]
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
    README: _quickstart,
    "index.md": _quickstart,
    "quickstart.md": _quickstart,
    "training.md": _training,
    "checkpoints.md": _checkpoints,
    "compiling.md": _compiling,
}
"""What has to be there when a page's examples have run."""


def test_every_page_with_examples_is_run() -> None:
    assert all((ROOT / "tests" / test).is_file() for test in ELSEWHERE.values())
    wanted = {"quickstart.md", "how-it-works.md", "choosing-tau.md", "training.md", "compiling.md", "evaluating.md"}
    assert set(EXAMPLES) >= wanted | {"checkpoints.md", "adding-an-ffn.md", *COMPLETE}


def test_the_overview_starts_as_the_readme_does() -> None:
    (snippet,), (same,) = ([b.code for b in blocks_of(source(p)) if b.language == "python"] for p in COMPLETE[:2])
    assert snippet == same and HUB in snippet


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


# --- the README -------------------------------------------------------------------------------------------------------


def readme_row(start: str) -> list[str]:
    """The cells of a row of the README's tables, without the first and without the link."""
    lines = (ROOT / README).read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("| ").split(" |")[1:-1]]


def record(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / README).read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize(("start", "name"), [("one FFN of Qwen2-7B", "ffn-h100"), ("all of Qwen2-7B", "decode-h100")])
def test_the_readme_s_speed_on_a_gpu_is_recorded(start: str, name: str) -> None:
    rows = [row for run in record(name)["runs"] for row in run["rows"]]
    rows = [row for row in rows if (row["geometry"], row["expert_size"], row["tokens"]) == ("qwen2-7b", 64, 1)]
    found = {row["sparsity"]: f"{row['speedup']:.2f}x" for row in rows}
    assert readme_row(start) == [found[share] for share in (0.5, 0.8, 0.9)]


def test_the_readme_s_speed_on_a_cpu_is_recorded() -> None:
    rows = [row for row in record("cpu-rows")["rows"] if (row["geometry"], row["T"]) == ("llama-3.2-1b", 1)]
    rows = [row for row in rows if row["dtype"] == "float32"]
    near = (min(rows, key=lambda row: abs(row["sparsity"] - share)) for share in (0.5, 0.8, 0.9))
    assert readme_row("one FFN of Llama-3.2-1B") == [f"{row['ratio'][0]:.1f}x" for row in near]


def test_the_readme_s_untrained_perplexities_are_recorded() -> None:
    kept = record("quality-smollm2-135m")
    rows = [(row["method"], row["perplexity"]) for row in kept["rows"]]
    routed = next(
        row["perplexity"] for row in kept["rows"] if (row.get("router"), row.get("budget")) == ("fitted", "sensitivity")
    )
    best = min((found for method, found in rows if method.startswith("static")), key=lambda found: found["0.5"])
    for start, found in (("without training: routed", routed), ("without training: the best static", best)):
        assert readme_row(start) == [f"{x:.1f}" for x in (kept["dense"], found["0.3"], found["0.5"])] + [""]


@pytest.mark.parametrize(("start", "method"), [("routed", "held"), ("the best static", "static-wanda")])
def test_the_readme_s_trained_perplexities_are_recorded(start: str, method: str) -> None:
    kept = record("adaptation-h200")["runs"]
    runs = [run for run in kept if run["run"]["settings"] == {"distill_logits": 1.0}]
    # The dense model at its best: it learns more from the text alone than with a teacher.
    dense = [row for run in kept if run["run"]["method"] == "dense" for row in run["rows"] if row["text"] == "books"]

    def mean_of(method: str, share: float) -> str:
        asked = [run for run in runs if (run["run"]["method"], run["run"]["sparsity"]) == (method, share)]
        values = [row["perplexity"] for run in asked for row in run["rows"] if row["text"] == "books"]
        return f"{sum(values) / len(values):.1f}" if values else ""

    wanted = [f"{min(row['perplexity'] for row in dense):.1f}", *(mean_of(method, share) for share in (0.3, 0.5, 0.8))]
    assert readme_row(f"trained for that sparsity: {start}") == wanted


def test_the_table_of_passes_names_them_all() -> None:
    from torch_prunepath.compile.passes import PASSES

    assert set(PASSES) <= {row[0].strip("`") for row in rows_of("compiling.md")}


# --- the site ---------------------------------------------------------------------------------------------------------


def build(folder: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    """Build the site from a copy of the sources, as tox does, with more text on the overview."""
    for part in ("docs", "benchmarks/results", "torch_prunepath", "integrations"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", folder)
    page = folder / "docs" / "index.md"
    page.write_text(page.read_text(encoding="utf-8") + more, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


@pytest.mark.parametrize("link", ["[a](nowhere.md)", "[a](training.md#nowhere)"])
def test_a_link_to_nowhere_fails_the_build(link: str, tmp_path: Path) -> None:
    built = build(tmp_path, f"\n{link}\n")
    assert built.returncode != 0 and "does not exist" in built.stdout + built.stderr


def test_every_page_is_in_the_menu(site: Path) -> None:
    menu = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    assert all(f'= "{page}"' in menu for page in PAGES)
    assert {page.removesuffix(".md") for page in PAGES} <= {path.stem for path in site.glob("*.html")}
    assert (site / "pictures" / "quality.svg").is_file() and (site / "records" / "ffn-h100.html").is_file()


def test_pages_ask_no_other_server(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, page.name


def words(html: str) -> str:
    """What a page says, without markup and with single spaces."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL))))


@pytest.fixture(scope="module")
def reference(site: Path) -> dict[str, str]:
    """The text after each name's anchor in the API reference, up to the next name's."""
    _, *parts = re.split(r'<h\d id="(torch_prunepath[\w.]+)"', (site / "api.html").read_text(encoding="utf-8"))
    return {name: words(f"<{text}") for name, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("module", ["", ".train", ".baselines", ".integrations.peft"])
def test_reference_holds_every_public_name(reference: dict[str, str], site: Path, module: str) -> None:
    page = words((site / "api.html").read_text(encoding="utf-8"))
    found = importlib.import_module(f"torch_prunepath{module}")
    assert len(found.__all__) > 1
    for name in found.__all__:
        doc = inspect.getdoc(getattr(found, name))
        assert doc, f"torch_prunepath{module}.{name} has no docstring"
        first = re.sub(r":\w+:`([^`]+)`", r"\1", doc.splitlines()[0]).replace("`", "")
        whole = inspect.ismodule(getattr(found, name))  # a module has a section of its own
        assert " ".join(first.split()) in (page if whole else reference[f"torch_prunepath{module}.{name}"]), name


def test_reference_has_no_rest_left(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    assert not re.search(r":(func|class|meth|mod|data|attr):", text)
    assert "Example::" not in text and "::: torch_prunepath" not in text
    assert re.search(r'<div class="highlight"><pre>.*?<span class="k">with</span>', text), "no highlighted code"


def test_signatures_in_the_reference_are_the_real_ones(reference: dict[str, str]) -> None:
    for name in ("sparsify", "set_tau", "set_sparsity", "record_sparsity"):
        written = reference[f"torch_prunepath.{name}"]
        for parameter in inspect.signature(getattr(torch_prunepath, name)).parameters.values():
            default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
            default = default.replace("'", '"')
            assert re.search(rf"\b{parameter.name}: [^:]+?{re.escape(default)}[,) ]", written), (parameter, written)
