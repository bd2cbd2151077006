"""E2E with a tiny Llama and made-up restaurants: every method, scores now or later, refusals."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama

from benchmarks.harness import Trained
from benchmarks.harness.kept import load_tensors
from benchmarks.harness.knobs import Constant, TauKnob
from benchmarks.harness.store import records_of
from benchmarks.tasks import e2e
from benchmarks.tasks.rows import METHODS
from torch_prunepath import record_sparsity, register_routing_hook, set_tau, sparsify
from torch_prunepath.console.errors import UserError

NAMES, FOODS = ("Vaults", "Mill", "Plough", "Eagle", "Cricketers", "Punter"), ("thai", "fish", "pasta", "sushi")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for file, names in ((e2e.TRAIN, NAMES), (e2e.TEST, ("Bridge", "Sorrento"))):
        rows = []
        for number, (name, food) in enumerate(itertools.product(names, FOODS)):
            meaning = f"name : {name} | food : {food}"
            texts = [f"{name} has {food} .", f"There is {food} at {name} .", f"Go to {name} ."][: 1 + number % 3]
            rows += [{"meaning_representation": meaning, "human_reference": text} for text in texts]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def call(model: Path, data: Path) -> Callable[..., int]:
    def run(output: Path, *options: Any) -> int:
        given = ["--model", model, "--data", data, "-o", output, "--device", "cpu", "--batch", 8, "--quiet"]
        given += ["--new-tokens", 6, "--eval-batch", 3, "--commit", "test", *options]
        return e2e.main(["run", *map(str, given)])

    return run


@pytest.fixture
def task(model: Path, data: Path) -> e2e.E2ETask:
    about: dict[str, Any] = {"batch": 8, "eval_batch": 3, "new_tokens": 6, "meanings": None, "device": "cpu"}
    return e2e.E2ETask(data, str(model), **about)


def test_every_method_from_run_to_report(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    settings = ("--set", "expert_size=8", "--sparsity", 0.5, "--steps", 4, "--meanings", 5, "--json")
    assert call(output, *settings) == 0
    done = json.loads(capsys.readouterr().out)
    assert len(done["done"]) == len(METHODS)
    assert call(output, *settings) == 0
    assert json.loads(capsys.readouterr().out) == {"done": [], "before": done["done"], "elsewhere": [], "left": []}

    for run in records_of(output).values():
        (point,) = run["rows"]
        assert point["report"]["sparsity"] == pytest.approx(point["asked"], abs=0.1), run["job"]["method"]
        assert len(point["generated"]) == point["report"]["meanings"] == 5
        assert 0 <= point["report"]["bleu"] <= 100 and 0 <= point["report"]["rouge_l"] <= 1
        assert point["select"]["score"] == -point["select"]["loss"]
        assert {"rouge_score", "sacrebleu"} <= run["versions"].keys()
    assert e2e.main(["report", str(output), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["method"] for row in rows} == set(METHODS)
    assert all(row["metrics"].keys() == {"bleu", "rouge_l"} for row in rows)
    assert (output / "report.png").stat().st_size > 1000


def test_half_a_pass_in_bfloat16(call: Callable[..., int], task: e2e.E2ETask, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert call(output, "--methods", "d2dmoe-held", "--sparsity", 0.5, "--epochs", 0.5, "--bf16") == 0
    steps = -(-len(task.batches(0)) // 2)
    runs = {run["job"]["method"]: run for run in records_of(output).values()}
    assert runs.keys() == {"dense", "d2dmoe-held"}
    for run in runs.values():
        assert run["job"]["steps"] == steps > 1
        assert sum(stage["config"]["steps"] for stage in run["stages"]) == steps
        assert all(stage["config"]["autocast"] for stage in run["stages"])
    assert len(runs["d2dmoe-held"]["stages"]) == 2 and "hoyer" in runs["d2dmoe-held"]["stages"][0]["last_tenth"]
    weights, _ = load_tensors(next((output / "cache").glob("dense-*.safetensors")))
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_scores_can_be_had_later(
    call: Callable[..., int],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("--methods", "static-norm", "--sparsity", 0.5, "--steps", 3, "--seeds", 0)
    now, later = tmp_path / "now", tmp_path / "later"
    assert call(now, *asked) == 0
    with monkeypatch.context() as without:
        without.setattr(e2e, "can_score", lambda: False)
        assert call(later, *asked) == 0
        assert all("bleu" not in p["report"] for r in records_of(later).values() for p in r["rows"])
        capsys.readouterr()
        assert e2e.main(["report", str(later)]) == 2
        assert "--data" in capsys.readouterr().err
        assert e2e.main(["report", str(later), "--data", str(data)]) == 2
        assert "pip install rouge-score sacrebleu" in capsys.readouterr().err
    assert e2e.main(["report", str(later), "--data", str(data)]) == 0
    points = [[run["rows"] for run in records_of(folder).values()] for folder in (now, later)]
    assert points[0] == points[1]
    capsys.readouterr()
    # Scored once, and kept.
    assert e2e.main(["report", str(later)]) == 0
    assert "rouge_l" in capsys.readouterr().out


def test_texts_of_other_data_are_not_scored() -> None:
    run = {"versions": {}, "rows": [{"report": {}, "generated": {"name : A": "A is ."}}]}
    with pytest.raises(UserError, match="made with other data"):
        e2e.score_run(run, {"name : B": ["B is ."]})
    assert e2e.score_run(run, {"name : A": ["A is ."], "name : B": ["B ."]})
    assert run["rows"][0]["report"]["rouge_l"] == 1.0  # type: ignore[index]
    assert not e2e.score_run(run, {})


# --- scores -----------------------------------------------------------------------------------------------------------

REFERENCES = [
    ["The Vaults is a cheap pub near the river .", "Near the river there is a cheap pub , The Vaults ."],
    ["Alimentum serves Chinese food in the city centre ."],
    ["Families are welcome at The Mill .", "The Mill is family friendly , and has a rating of five ."],
]


def test_a_perfect_text_scores_all_and_a_shuffled_one_less() -> None:
    for pick in (0, -1):  # any of the references will do
        found = e2e.scores([texts[pick] for texts in REFERENCES], REFERENCES)
        assert found == {"bleu": pytest.approx(100.0), "rouge_l": pytest.approx(1.0)}
    others = e2e.scores([texts[0] for texts in (*REFERENCES[1:], REFERENCES[0])], REFERENCES)
    backwards = e2e.scores([" ".join(texts[0].split()[::-1]) for texts in REFERENCES], REFERENCES)
    for worse in (others, backwards):
        assert worse["bleu"] < 20 and worse["rouge_l"] < 0.5
    half = e2e.scores([REFERENCES[0][0], REFERENCES[1][0], "nothing"], REFERENCES)
    assert others["bleu"] < half["bleu"] < 100 and half["rouge_l"] == pytest.approx(2 / 3)


# --- data, loss, generation -------------------------------------------------------------------------------------------


def test_parts_of_the_validation_file_are_fixed_and_disjoint(task: e2e.E2ETask, data: Path) -> None:
    meanings = [f"name : {i}" for i in range(50)]
    train, select = e2e.split(meanings)
    assert len(select) == 5 and not set(train) & set(select) and sorted(train + select) == sorted(meanings)
    assert e2e.split(meanings[::-1] + meanings) == (train, select)
    # The choice is part of every published number: it must not change.
    assert e2e.split(["a", "b", "c", "d"]) == (["a", "b", "c"], ["d"])
    with pytest.raises(UserError, match="too few"):
        e2e.split(["a", "a"])
    texts = e2e.references(e2e.read_rows(data, e2e.TRAIN))
    number = sum(map(len, texts.values()))
    assert len(task.train) + len(task.select) == number and task.select


def test_the_loss_counts_the_reference_and_its_end(task: e2e.E2ETask) -> None:
    row = task._row("name : Mill", "Mill .")
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == token]
    assert task.tokenizer.decode(counted[:-1]) == " Mill ." and counted[-1] == task.eos
    assert row["input_ids"][: len(task.prompt("name : Mill"))] == task.prompt("name : Mill")

    model = task.fresh(0)
    total, labels = 0.0, 0
    with torch.no_grad():
        for row in task.select:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            for position, label in enumerate(row["labels"][1:]):
                if label != e2e.IGNORED:
                    total, labels = total - float(logits[position, label]), labels + 1
    assert task._loss(Trained(model, Constant(0.0)))["loss"] == pytest.approx(total / labels, rel=1e-4)


def test_batches_of_one_shape_lose_the_same_as_others(task: e2e.E2ETask) -> None:
    dense, longest = task.fresh(0).eval(), max(len(row["input_ids"]) for row in task.train)
    assert len(task.train) % 8, "so that the last batch is filled up"
    plain, even = list(task.batches(3)), list(task.batches(3, one_shape=True))
    assert len({batch["input_ids"].shape for batch in plain}) > 2
    with torch.no_grad():
        for one, other in zip(plain, even, strict=True):
            assert {tuple(value.shape) for value in other.values()} == {(8, longest)}
            assert int((other["labels"] != e2e.IGNORED).sum()) == int((one["labels"] != e2e.IGNORED).sum())
            assert float(dense(**other).loss) == pytest.approx(float(dense(**one).loss), rel=1e-5)


def test_a_compiled_run_gives_what_an_eager_one_gives(call: Callable[..., int], tmp_path: Path) -> None:
    asked = (
        "--methods",
        "held",
        "lte-held",
        "--sparsity",
        0.5,
        "--steps",
        4,
        "--meanings",
        2,
        "--set",
        "expert_size=8",
    )
    asked += ("--set", "fit_tokens=10000")  # all, for a sample of longer rows has other tokens
    losses: dict[str, list[float]] = {}
    for name, how in (("eager", ()), ("compiled", ("--compile", "aot_eager"))):
        assert call(tmp_path / name, *asked, *how) == 0
        runs = sorted(records_of(tmp_path / name).values(), key=lambda run: str(run["job"]["method"]))
        losses[name] = [run["rows"][0]["select"]["loss"] for run in runs]
        assert {stage["compiled"] for run in runs for stage in run["stages"]} == {how[-1] if how else None}
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)


def test_batched_generation_is_what_each_text_gives_alone(task: e2e.E2ETask) -> None:
    model = task.fresh(0)
    found = task.generate(model)
    assert list(found) == list(task.test)
    lengths = {len(task.prompt(meaning)) for meaning in task.test}
    assert len(lengths) > 2, "so that rows are padded"
    for meaning, (text, tokens) in found.items():
        ids = task.prompt(meaning)
        with torch.no_grad():
            for token in tokens:
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
                ids.append(token)
        assert text == task.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_sparsity_is_that_of_prompts_and_texts_without_padding(task: e2e.E2ETask) -> None:
    model = sparsify(task.fresh(0), tau=1.0, calibration=task.calibration(), progress=False)
    set_tau(model, 0.8)
    # Texts that end early: what batched generation does with their rows afterwards must not count.
    texts = {meaning: ("", [70] * (i % 4)) for i, meaning in enumerate(task.test)}
    expected, tokens = 0.0, 0
    with torch.no_grad():
        for meaning, (_, own) in texts.items():
            ids = task.prompt(meaning) + own
            with record_sparsity(model) as record:
                model(torch.tensor([ids]), use_cache=False)
            expected, tokens = expected + record.sparsity * len(ids), tokens + len(ids)
    found = task._sparsity(Trained(model, TauKnob(model)), texts)
    assert found == pytest.approx(expected / tokens, rel=1e-5) and 0.05 < found < 0.95
    with register_routing_hook(model, lambda routing: torch.ones_like(routing.mask_TE)):
        assert task._sparsity(Trained(model, TauKnob(model)), texts) == 0.0


def test_a_little_training_teaches_the_form(call: Callable[..., int], tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("--methods", "held", "--sparsity", 0.5, "--steps", 60, "--dense-lr", 5e-3, "--lr", 2e-3)
    assert call(output, *options, "--new-tokens", 24) == 0
    found = {}
    for run in records_of(output).values():
        found[run["job"]["method"]] = run["rows"][0]
    assert found["dense"]["select"]["loss"] < 2.0, "an untrained model is at 6"
    assert found["held"]["select"]["loss"] < 3.0
    assert found["dense"]["report"]["rouge_l"] > 0.2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--new-tokens", 0), "--new-tokens 0 must be positive"),
        (("--meanings", -1), "--meanings -1 must be positive"),
        (("--sparsity", 0.0), "outside (0, 1)"),
        (("--set", "hoyer"), "says no value"),
        (("--methods", "static-norm", "--set", "hoyer=1"), "no method has hoyer"),
        (("--methods", "lte-held", "--steps", 1), "both stages need a step"),
        (("--model", "/nowhere.gguf"), "there is no model"),
    ],
)
def test_what_cannot_work_is_refused(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[Any, ...], message: str
) -> None:
    assert call(tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_are_refused(call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path / "out", "--data", tmp_path) == 2
    assert "there is no e2e_valid" in capsys.readouterr().err
    (tmp_path / "e2e_valid.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "e2e_test.jsonl").write_text("")
    assert call(tmp_path / "out", "--data", tmp_path) == 2
    assert "row 1 has no 'meaning_representation'" in capsys.readouterr().err
