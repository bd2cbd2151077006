"""The GLUE tasks with a tiny encoder and made-up tasks: every method, restart, report, splits, metrics."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.harness import METHODS as ALL
from benchmarks.harness import Job, Trained
from benchmarks.harness.knobs import TauKnob
from benchmarks.harness.scores import Halves, rows_of
from benchmarks.harness.store import Store, records_of
from benchmarks.tasks import glue
from benchmarks.tasks.glue import preference
from benchmarks.tasks.rows import METHODS as NAMES
from benchmarks.tasks.rows import Shuffled, padded
from torch_prunepath import register_routing_hook, sparsify
from torch_prunepath.console.errors import UserError
from torch_prunepath.train.batches import IGNORED

METHODS = {name: ALL[name] for name in NAMES}
WORDS = [f"w{i}" for i in range(20)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers, with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "good", "bad", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def sentence(random_: random.Random) -> tuple[str, int]:
    label = random_.randrange(2)
    words = [random_.choice(WORDS) for _ in range(random_.randrange(1, 12))]
    words.insert(random_.randrange(len(words) + 1), ("bad", "good")[label])
    return " ".join(words), label


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks that one word of a sentence decides."""
    folder = tmp_path_factory.mktemp("data")
    source = random.Random(0)
    for name, number in (("sst2_train", 200), ("sst2_dev", 60)):
        rows = [sentence(source) for _ in range(number)]
        write(folder / f"{name}.jsonl.gz", [{"sentence": text, "label": label} for text, label in rows])
    for name, number in (("mrpc_train", 96), ("mrpc_dev", 40)):
        pairs = [(sentence(source), sentence(source)) for _ in range(number)]
        rows = [{"sentence1": a, "sentence2": b, "label": label} for (a, label), (b, _) in pairs]
        write(folder / f"{name}.jsonl.gz", rows)
    rows = [{"question": "w1 w2", "sentence": text, "label": label} for text, label in map(sentence, [source] * 150)]
    write(folder / "qnli_dev.jsonl.gz", rows)
    return folder


@pytest.fixture
def call(model: Path, data: Path) -> Callable[..., int]:
    def run(output: Path, *options: Any) -> int:
        given = ["--model", model, "--data", data, "-o", output, "--device", "cpu", "--batch", 16, "--quiet", *options]
        return glue.main(["run", *map(str, given)])

    return run


FAST = ("--lr", 3e-3, "--dense-lr", 3e-3, "--commit", "test")


def test_every_method_from_run_to_report(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    asked = ("--tasks", "sst2", "--steps", 30, *FAST, "--set", "expert_size=8", "--json")
    others = [name for name in METHODS if name != "ours"]
    assert call(output, *asked, "--methods", *others, "--set", "held.distill_logits=1.0", "--sparsity", 0.5) == 0
    done = json.loads(capsys.readouterr().out)
    assert len(done["done"]) == len(others) and not done["before"]
    assert call(output, *asked, "--methods", "ours", "--sparsity", 0.5, 0.7) == 0
    done = json.loads(capsys.readouterr().out)
    assert len(done["done"]) == 1 and len(done["before"]) == 1, "one run for both, from the same dense model"

    runs = records_of(output)
    assert {run["job"]["method"] for run in runs.values()} == set(METHODS)
    for run in runs.values():
        assert {"hardware", "versions", "commit", "command_line", "stages"} <= run.keys()
        assert run["commit"] == "test" and run["versions"]["torch"] == torch.__version__
        job = run["job"]
        own = [stage for stage in run["stages"] if stage["config"]["lr"] == 3e-3]
        steps = sum(stage["config"]["steps"] for stage in own)
        # Only the fine-tuning of the seed trains the dense model; all others load it and take 30 steps of their own.
        assert steps == 30, (job["method"], steps)
        for point in run["rows"]:
            target = point["asked"]
            expected = {"dense": 0.0, "dense-longer": 0.0}.get(job["method"], target)
            for half in ("select", "report"):
                assert point[half]["sparsity"] == pytest.approx(expected, abs=0.08), (job["method"], half)
    assert sum(len(run["rows"]) for run in runs.values() if run["job"]["method"] == "ours") == 2

    assert glue.main(["report", str(output), "--json"]) == 0
    rows = {(row["method"], row["target"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    expected = {(name, 0.0 if METHODS[name].dense else 0.5) for name in METHODS}
    assert rows.keys() == expected | {("ours", 0.7)}
    learnt = {key: row["metrics"]["accuracy"]["mean"] for key, row in rows.items()}
    assert learnt["dense", 0.0] > 0.9 and learnt["held", 0.5] > 0.8, learnt
    assert rows["held", 0.5]["settings"] == [{"expert_size": 8, "distill_logits": 1.0}]
    assert rows["static-norm", 0.5]["settings"] == [{}]

    assert glue.main(["report", str(output), "--both-halves", "--json"]) == 0
    crossed = json.loads(capsys.readouterr().out)
    assert crossed["both_halves"] and {(row["method"], row["target"]) for row in crossed["rows"]} == rows.keys()

    assert glue.main(["report", str(output)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in METHODS) and "accuracy" in text
    assert (output / "report.md").read_text().count("static-norm") == 1
    assert (output / "report.png").stat().st_size > 1000
    assert not list(output.rglob("*.partial"))


def test_finished_runs_are_not_done_again(
    call: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    asked = ("--tasks", "sst2", "--methods", "static-norm", "--sparsity", 0.5, "--steps", 3, *FAST, "--json")

    def run(*more: Any) -> dict[str, list[str]]:
        assert call(output, *asked, *more) == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    first = run()
    files = {path: path.read_bytes() for path in output.rglob("*.json")}
    assert run() == {"done": [], "before": first["done"], "elsewhere": [], "left": []}
    assert {path: path.read_bytes() for path in output.rglob("*.json")} == files

    # Without its weights, the fine-tuning is repeated for the run that needs it, and gives the same.
    (lost,) = (path for path in files if "static" in path.name)
    before = json.loads(lost.read_text())
    lost.unlink()
    for weights in (output / "cache").glob("dense-*.safetensors"):
        weights.unlink()
    again = run()
    assert again["done"] == [lost.stem]
    after = json.loads(lost.read_text())
    assert after["rows"] == before["rows"]
    assert len(list((output / "cache").glob("dense-*.safetensors"))) == 1, "it was made again"

    # A model is known by its weights, not by where it lies.
    moved = shutil.copytree(model, tmp_path / "moved")
    assert run("--model", moved)["done"] == []
    other = json.loads((moved / "config.json").read_text()) | {"hidden_dropout_prob": 0.2}
    (moved / "config.json").write_text(json.dumps(other))
    assert len(run("--model", moved)["done"]) == 2

    # Whatever else decides a run's outcome makes it another run.
    for more in (("--seeds", 1), ("--set", "warmup=0.2"), ("--lr", 1e-3)):
        assert any("static" in name for name in run(*more)["done"]), more
    lost.write_text("{")
    assert call(output, *asked) == 2
    assert "remove it" in capsys.readouterr().err


def converted(output: Path) -> list[Path]:
    files = (output / "cache").glob("*.safetensors")
    return [path for path in files if not path.name.startswith("dense-")]


def test_a_conversion_is_made_once_and_trains_alike_when_it_is_kept(call: Callable[..., int], tmp_path: Path) -> None:
    methods, others = ("held", "ours", "moefication-mlp", "lte-held"), ("static-norm", "d2dmoe-held")
    asked = ("--tasks", "sst2", "--steps", 6, "--dense-lr", 3e-3, "--sparsity", 0.5, 0.7, "--set", "expert_size=8")
    given = (*asked, "--methods", *methods, *others, "--lr", 3e-3)

    def runs_of(output: Path) -> dict[str, dict[str, Any]]:
        return {name: run for name, run in records_of(output).items() if run["job"]["method"] != "dense"}

    def kept(runs: dict[str, dict[str, Any]], *of: str) -> list[bool | None]:
        return [run["conversion_kept"] for run in runs.values() if run["job"]["method"] in of]

    assert call(tmp_path, *given) == 0
    first = runs_of(tmp_path)
    assert kept(first, *methods).count(False) == len(converted(tmp_path)) == 3
    assert set(kept(first, *others)) == {None}, "what depends on the target is made anew"

    for name in first:
        (tmp_path / "runs" / f"{name}.json").unlink()
    assert call(tmp_path, *given) == 0
    again = runs_of(tmp_path)
    assert all(kept(again, *methods))
    for name, run in first.items():
        assert again[name]["rows"] == run["rows"], name
        pairs = zip(again[name]["stages"], run["stages"], strict=True)
        assert all(after["last_tenth"] == before["last_tenth"] for after, before in pairs), name

    # Other rates start from the same models; other settings, seeds and weights do not.
    assert call(tmp_path, *given, "--methods", *methods, "--lr", 1e-3) == 0
    for more in (("--set", "expert_size=4"), ("--seeds", 1), ("--dense-lr", 2e-3)):
        before = len(converted(tmp_path))
        assert call(tmp_path, *given, "--methods", "lte-held", "--sparsity", 0.5, *more) == 0
        assert len(converted(tmp_path)) == before + 1, more
        assert before < 6


def test_a_conversion_of_other_weights_is_not_taken(call: Callable[..., int], tmp_path: Path) -> None:
    asked = ("--tasks", "sst2", "--steps", 2, *FAST, "--methods", "lte-held", "--sparsity", 0.5)
    assert call(tmp_path, *asked) == 0
    (weights,) = (tmp_path / "cache").glob("dense-*.safetensors")
    with safe_open(weights, framework="pt") as file:
        said = file.metadata()
    save_file({key: value * 1.5 for key, value in load_file(weights).items()}, weights, metadata=said)
    (run,) = (tmp_path / "runs").glob("*lte*")
    before = json.loads(run.read_text())
    run.unlink()
    assert call(tmp_path, *asked) == 0
    after = json.loads(run.read_text())
    assert before["conversion_kept"] is after["conversion_kept"] is False
    assert after["history"] != before["history"]


def test_a_compiled_run_gives_what_an_eager_one_gives(call: Callable[..., int], model: Path, tmp_path: Path) -> None:
    steady = shutil.copytree(model, tmp_path / "steady")  # dropout would draw other numbers where rows are longer
    config = json.loads((steady / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (steady / "config.json").write_text(json.dumps(config))
    rates = ("--lr", 3e-4, "--dense-lr", 3e-3)
    asked = ("--model", steady, "--tasks", "sst2", "--steps", 4, *rates, "--sparsity", 0.5, "--set", "expert_size=8")
    more = ("--set", "held.distill_logits=1", "--methods", *(name for name in METHODS if name != "ours"))
    found = {}
    for how in (None, "aot_eager"):
        output = tmp_path / str(how)
        assert call(output, *asked, *more, *(() if how is None else ("--compile", how))) == 0
        found[how] = {run["job"]["method"]: run for run in records_of(output).values()}
    assert found[None].keys() == found["aot_eager"].keys()
    for method, eager in found[None].items():
        compiled = found["aot_eager"][method]
        assert (eager["job"]["compile"], compiled["job"]["compile"]) == (None, "aot_eager")
        hooks = {"d2dmoe-held": 1}.get(method, 0)
        near = {
            "rel": 2e-2 if method == "lte-held" else 1e-3
        }  # its separation loss, in the thousands here, magnifies noise
        after = [stage["compiled"] for stage in compiled["stages"]]
        assert after == [None] * hooks + ["aot_eager"] * (len(after) - hooks), method
        assert not any(stage["compiled"] for stage in eager["stages"])
        for before, stage in zip(eager["stages"], compiled["stages"], strict=True):
            assert stage["last_tenth"]["task"] == pytest.approx(before["last_tenth"]["task"], **near), method
        for before, point in zip(eager["rows"], compiled["rows"], strict=True):
            assert point["report"]["loss"] == pytest.approx(before["report"]["loss"], **near), method


def test_runs_keep_their_names() -> None:
    about = {"model": "m", "weights": "w", "about": {"data": "d"}, "autocast": True, "compile": None, "seconds": None}
    job = Job("rte", "held", {"expert_size": 8}, (0.5,), 1e-4, 3, 100, 2e-4, **about)
    assert job.name == "rte-held-50-lr0.0001-seed3-82b494cc12"
    assert dataclasses.replace(job, model="elsewhere").name == job.name
    assert dataclasses.replace(job, compile="default").name != job.name


def test_each_seed_s_choice_is_made_by_the_selection_half() -> None:
    def run(seed: int, lr: float, select: float, held: float) -> dict[str, Any]:
        job = {"task": "rte", "method": "held", "steps": 5, "seed": seed, "lr": lr, "settings": {}}
        job |= {"weights": "w", "about": {"data": "d"}}
        report = {"accuracy": held, "sparsity": 0.8}
        return {"job": job, "failed": None, "rows": [{"asked": 0.8, "select": {"score": select}, "report": report}]}

    runs = {
        "a": run(0, 1e-4, 0.7, 0.5),
        "b": run(0, 1e-3, 0.6, 0.9),
        "c": run(1, 1e-3, 0.8, 0.6),
        "d": run(1, 1e-4, 0.7, 0.9),
        "e": {**run(2, 1.0, 0.0, 0.0), "rows": [], "failed": "the loss is nan"},
    }
    (row,) = rows_of(runs, ("accuracy", "f1"))
    assert row["seeds"] == [0, 1] and row["lr"] == [1e-4, 1e-3]
    assert row["metrics"] == {"accuracy": {"mean": pytest.approx(0.55), "least": 0.5, "most": 0.6}}
    for other in ({"weights": "another"}, {"about": {"data": "another"}}):
        other = {**runs["b"], "job": {**runs["b"]["job"], **other}}
        with pytest.raises(UserError, match="keep each in a folder of its own"):
            rows_of({**runs, "f": other}, ("accuracy",))


def test_each_half_is_reported_with_what_the_other_prefers() -> None:
    def run(lr: float, *accuracies: float, sparsity: float = 0.8) -> dict[str, Any]:
        job = {"task": "rte", "method": "held", "steps": 5, "seed": 0, "lr": lr, "settings": {}}
        job |= {"weights": "w", "about": {"data": "d"}}
        rows = zip((10, 30), accuracies, strict=True)
        halves = [{"rows": n, "accuracy": value, "loss": lr, "sparsity": sparsity} for n, value in rows]
        return {"job": job, "failed": None, "rows": [{"asked": 0.8, "select": halves[0], "report": halves[1]}]}

    runs = {"a": run(1e-4, 0.9, 0.5), "b": run(1e-3, 0.6, 0.7, sparsity=0.7), "c": run(1e-2, 0.6, 0.7, sparsity=0.1)}
    (row,) = rows_of(runs, ("accuracy",), Halves(preference, both=True))
    # "a" for the second half, since the first prefers it; "b" for the first, whose loss is below that of "c".
    assert row["metrics"]["accuracy"]["mean"] == pytest.approx((10 * 0.6 + 30 * 0.5) / 40)
    assert row["realised_sparsity"] == pytest.approx((10 * 0.7 + 30 * 0.8) / 40)
    assert row["seeds"] == [0] and row["lr"] == [1e-4, 1e-3]
    (row,) = rows_of(runs, ("accuracy",), Halves(preference))
    assert row["metrics"]["accuracy"]["mean"] == 0.5 and row["lr"] == [1e-4]


def test_a_run_that_diverges_is_noted_and_the_others_go_on(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    asked = ("--tasks", "sst2", "--methods", "dense-longer", "--steps", 4, "--dense-lr", 1e-3, "--set", "warmup=0")
    assert call(output, *asked, "--lr", 1e30, 1e-3, "--set", "clip=None") == 0
    runs = records_of(output).values()
    failed = [run for run in runs if run["failed"]]
    assert [run["job"]["lr"] for run in failed] == [1e30] and failed[0]["rows"] == []
    capsys.readouterr()
    assert glue.main(["report", str(output)]) == 0
    assert "failed" in capsys.readouterr().out


def test_two_rates_of_fine_tuning_compete(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    asked = ("--tasks", "mrpc", "--methods", "dense-longer", "--steps", 12, "--lr", 1e-3)
    assert call(output, *asked, "--dense-lr", 1e-7, 3e-3) == 0
    runs = records_of(output).values()
    dense = {run["job"]["lr"]: run for run in runs if run["job"]["method"] == "dense"}
    best = max(dense, key=lambda lr: dense[lr]["rows"][0]["select"]["score"])
    (other,) = (run for run in runs if run["job"]["method"] == "dense-longer")
    assert other["job"]["dense_lr"] == best
    for run in runs:
        report = run["rows"][0]["report"]
        assert 0 <= report["f1"] <= 1 and report["rows"] == 20
    capsys.readouterr()
    assert glue.main(["report", str(output)]) == 0
    assert "f1" in capsys.readouterr().out


# --- data and metrics -------------------------------------------------------------------------------------------------


def test_halves_are_fixed_disjoint_and_balanced() -> None:
    source = random.Random(1)
    rows = [{"sentence": text, "label": label} for text, label in map(sentence, [source] * 301)]
    rows += rows[:20]  # equal texts stay together
    none, select, held = glue.split(rows, ("sentence",))
    assert none == [] and len(select) + len(held) == 321
    texts = [{row["sentence"] for row in part} for part in (select, held)]
    assert not texts[0] & texts[1]
    shuffled = random.Random(2).sample(rows, len(rows))
    again = glue.split(shuffled, ("sentence",))
    assert [{row["sentence"] for row in part} for part in again[1:]] == texts
    shares = [sum(row["label"] for row in part) / len(part) for part in (select, held)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
    # The choice is part of every published number: it must not change.
    known = [{"sentence": f"text {i}", "label": 0} for i in range(6)]
    assert [row["sentence"] for row in glue.split(known, ("sentence",))[1]] == ["text 3", "text 5", "text 2"]


def test_a_task_without_training_file_trains_on_three_fifths_of_dev(data: Path) -> None:
    train, select, held = glue.rows_of(glue.GLUE["qnli"], data)
    parts = [{row["sentence"] for row in part} for part in (train, select, held)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert len(train) == pytest.approx(90, abs=5) and len(select) == pytest.approx(len(held), abs=5)


def test_batches_hold_every_row_once_a_pass_in_another_order(data: Path, model: Path) -> None:
    task = glue.GlueTask("qnli", data, str(model), batch=16, length=32, device="cpu")
    feed = task.batches(0)
    passes = [list(feed), list(feed)]
    rows = [sorted(tuple(ids[ids > 0].tolist()) for batch in each for ids in batch["input_ids"]) for each in passes]
    assert rows[0] == rows[1] == sorted(tuple(row["input_ids"]) for row in task.train)
    assert not torch.equal(passes[0][0]["labels"], passes[1][0]["labels"])
    assert torch.equal(next(iter(task.batches(0)))["labels"], passes[0][0]["labels"])
    for batch in passes[0]:
        assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] != 0)
    labels = torch.cat([batch["labels"] for batch in passes[0]])
    assert 0 < labels.float().mean() < 1
    calibration = task.calibration()
    assert all("labels" not in batch for batch in calibration)


def test_batches_of_one_shape_lose_the_same_as_others(data: Path, model: Path) -> None:
    task = glue.GlueTask("qnli", data, str(model), batch=16, length=32, device="cpu")
    dense, longest = task.fresh(0).eval(), max(len(row["input_ids"]) for row in task.train)
    assert longest < 32 and len(task.train) % 16, "so that rows are padded, and the last batch filled up"
    plain, even = task.batches(3), task.batches(3, one_shape=True)
    assert len(plain) == len(even)
    with torch.no_grad():
        for one, other in zip([*plain, *plain], [*even, *even], strict=True):
            assert {key: tuple(value.shape) for key, value in other.items()} == {
                key: (16,) if key == "labels" else (16, longest) for key in one
            }
            assert float(dense(**other).loss) == pytest.approx(float(dense(**one).loss), rel=1e-5)
            added = other["labels"][len(one["labels"]) :]
            assert torch.equal(other["labels"][: len(one["labels"])], one["labels"]) and (added == IGNORED).all()
            assert other["attention_mask"].any(-1).all(), "a row without text would have no attention to give"


def test_fewer_rows_than_a_batch_make_one_whole_batch() -> None:
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in (1, 3)]
    (batch,) = Shuffled(rows, 5, 0, {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}, one_shape=True)
    assert {tuple(value.shape) for value in batch.values()} == {(5, 3)}
    assert (batch["labels"] == 5).sum() == 4 and (batch["labels"][2:] == IGNORED).all()


def test_padding_does_not_count_in_sparsity(data: Path, model: Path) -> None:
    task = glue.GlueTask("sst2", data, str(model), batch=16, length=32, device="cpu")
    sparse = sparsify(task.fresh(0), tau=1.0, calibration=task.calibration(), progress=False)
    masks = iter([])

    def route(routing: Any) -> torch.Tensor:
        # Real tokens keep every expert, padding keeps none.
        return next(masks).reshape(-1, 1).expand_as(routing.mask_TE)

    rows = sorted(task.report, key=lambda row: len(row["input_ids"]))
    batches = [padded(rows[i : i + 64], task.pad) for i in range(0, len(rows), 64)]
    masks = iter([batch["attention_mask"].bool() for batch in batches for _ in range(2)])
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    with register_routing_hook(sparse, route):
        assert task._half(Trained(sparse, TauKnob(sparse)), task.report)["sparsity"] == 0.0


def test_metrics() -> None:
    labels = [0, 1, 1, 0, 1]
    assert glue.accuracy(labels, labels) == 1.0 and glue.f1(labels, labels) == 1.0
    assert glue.accuracy([1, 1, 1, 1, 1], labels) == 0.6 and glue.f1([1] * 5, labels) == 0.75
    assert glue.f1([0] * 5, labels) == 0.0 and glue.f1([0], [0]) == 0.0
    # Precision 1/2, recall 1/3.
    assert glue.f1([1, 1, 0, 0, 0], labels) == pytest.approx(0.4)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sparsity", 1.0), "outside (0, 1)"),
        (("--steps", 0), "must be positive"),
        (("--batch", -1), "must be positive"),
        (("--lr", -1), "must be positive"),
        (("--length", 2), "at least 8"),
        (("--device", "nonsense"), "this machine has none"),
        (("--set", "expert_size"), "says no value"),
        (("--set", "expert_sise=8"), "no method has expert_sise"),
        (("--set", "seed=8"), "no method has seed"),
        (("--set", "lte-held.score=norm"), "no method has score"),
        (("--methods", "ours", "--set", "static-norm.score=norm"), "not among --methods"),
        (("--set", "expert_size=0"), "must be at least 1"),
        (("--set", "warmup=3"), "outside [0, 1]"),
        (("--compile", "nonsense"), "knows no such mode: choose from default, reduce-overhead"),
        (("--compile", "--set", "held.distill_ffn=1"), "distill_ffn watches outputs with hooks"),
        (("--set", "first=2"), "outside [0, 1]"),
        (("--model", "/nowhere"), "there is no model"),
        (("--data", "/nowhere"), "there is no folder"),
        (("--tasks", "rte"), "there is no rte_dev"),
    ],
)
def test_what_cannot_work_is_refused(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[Any, ...], message: str
) -> None:
    assert call(tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_left_alone(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert call(tmp_path, "--tasks", "sst2", "--methods", "dense", "--steps", 1) == 2
    assert "holds something else" in capsys.readouterr().err
    assert glue.main(["report", str(tmp_path)]) == 2
    assert "there is no result of sst2, mrpc, rte, qnli in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    empty = tmp_path / "empty"
    job = {"task": "rte", "weights": "w", "about": {"data": "d"}}
    Store(empty).write("diverged", {"format": 2, "job": job, "rows": [], "failed": "the loss is nan"})
    assert glue.main(["report", str(empty)]) == 2
    assert "no run has ended well" in capsys.readouterr().err


def test_every_method_trains_towards_the_fine_tuned_model_alone(call: Callable[..., int], tmp_path: Path) -> None:
    asked = ("--tasks", "sst2", "--steps", 3, *FAST, "--sparsity", 0.5, "--set", "distill_logits=2", "--set", "task=0")
    methods = [name for name in METHODS if name != "dense"]
    assert call(tmp_path, *asked, "--set", "expert_size=8", "--methods", *methods) == 0
    runs = {run["job"]["method"]: run for run in records_of(tmp_path).values() if run["job"]["settings"]}
    assert runs.keys() == set(methods)
    for name, run in runs.items():
        records = [stage["last_tenth"] for stage in run["stages"] if stage["config"]["distill_logits"]]
        assert records and all("task" not in each and each["distill_logits"] >= 0 for each in records), name
