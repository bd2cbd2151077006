"""The benchmark of training: what it runs and reports. Nothing here depends on how long anything takes."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama, tiny_llama

from benchmarks import training
from benchmarks.training import MODES, SIDES, Side, config_of, main, make_sparse, parser, train_densely
from torch_prunepath import sparse_layers
from torch_prunepath.baselines import train_dense
from torch_prunepath.train import recipes

SMALL: list[Any] = ["--context", 16, "--rows", 2, "--warmup", 1, "--steps", 3, "--device", "cpu", "--backend", "eager"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def arguments(*more: object) -> argparse.Namespace:
    return parser().parse_args([str(argument) for argument in [*SMALL, *more]])


def batches(number: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 200, (2, 16), generator=generator)} for _ in range(number)]


def test_every_side_in_every_mode(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", tiny, *SMALL, "--modes", *MODES, "--json"]
    assert main([str(argument) for argument in given]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(row["side"], row["mode"]) for row in results["rows"]] == [(side, mode) for mode in MODES for side in SIDES]
    for row in results["rows"]:
        assert row["step_ms"] >= row["least_ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(32 / row["step_ms"] * 1e3, rel=1e-3)
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
    assert results["command_line"].startswith("python -m benchmarks training --model")


def test_a_profile_says_where_a_step_goes(tiny: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.txt"
    given = ["--model", tiny, *SMALL, "--profile", profile, "--sides", "dense", "held", "--modes", "eager"]
    assert main([str(argument) for argument in given]) == 0
    dense, held = profile.read_text().split("held, eager\n")
    assert dense.startswith("dense, eager\n") and "aten::mm" in dense and "prunepath::" not in dense
    assert "aten::mm" in held and "prunepath::" in held


def test_a_geometry_with_fewer_layers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = training.Geometry("small", "llama", 32, 64, 4, 2, 1, 100, True, 64)
    monkeypatch.setattr(training, "resolve", lambda name: small)
    given = ["--model", "small", "--layers", 1, *SMALL, "--sides", "dense", "task", "--modes", "eager"]
    assert main([str(argument) for argument in given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[:2] == ["dense", "eager"] and "1.00x" in lines[-2]
    assert lines[-1].split()[:2] == ["task", "eager"] and "x" in lines[-1].split()[5]
    assert training.build("small", 1, "cpu", 0).config.num_hidden_layers == 1


def test_the_dense_loop_trains_as_the_library_does() -> None:
    config = config_of("dense", 5, 0.5, bf16=False)
    config = training.dataclasses.replace(config, contribution_fit=0.0, warmup=0.0, decay="constant", weight_decay=0.0)
    mine, theirs = tiny_llama(), tiny_llama()
    ticks: list[int] = []
    train_densely(mine, batches(), config, lambda: ticks.append(1))
    train_dense(theirs, batches(), config, progress=False)
    assert len(ticks) == 5
    assert not torch.equal(mine.lm_head.weight, tiny_llama().lm_head.weight)
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


def test_a_model_that_diverges_gives_no_row() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        train_densely(model, batches(), config_of("dense", 1, 0.5, bf16=False), lambda: None)


@pytest.mark.parametrize("side", SIDES[1:])
def test_a_side_holds_the_sparsity_with_the_losses_of_its_recipe(side: str) -> None:
    config = config_of(side, 30, 0.6, bf16=True)
    paper, held = recipes.paper(), recipes.held(30, 0.6, distil=1.0)
    expected = {
        "task": {"task": 1.0},
        "held": {k: v for k, v in held.losses.items() if k != "distill_logits"},
        "held-distil": held.losses,
        "paper": paper.losses,
    }
    assert config.losses == expected[side]
    assert config.autocast and [(p.first, p.last) for p in config.phases] == [(0.6, 0.6)]


def test_routers_differ_and_the_release_has_its_gate() -> None:
    model = tiny_llama()
    make_sparse(model, "paper", 4, seed=0)
    first, second = sparse_layers(model).values()
    assert (first.experts.gate, first.experts.rule) == ("sigmoid", "below")
    assert not torch.equal(first.router.weight, second.router.weight)


def test_sides_do_not_touch_each_other() -> None:
    dense = tiny_llama()
    before = copy.deepcopy(dense.state_dict())
    side = Side(dense, "held-distil", "default", arguments())
    side.measure(batches())
    after = dense.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert side.teacher is not None
    assert all(torch.equal(value, before[key]) for key, value in side.teacher.state_dict().items())
    assert all("forward" not in module.__dict__ for module in [*side.model.modules(), *side.teacher.modules()])


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (["--model", "gpt9"], "neither a geometry nor a model's folder"),
        (["--layers", 1], "--layers shortens geometries"),
        (["--context", 1], "at least 2"),
        (["--context", 100_000], "longer than the model's"),
        (["--rows", 0], "must be positive"),
        (["--steps", 0], "must be positive"),
        (["--warmup", -1], "must not be negative"),
        (["--sparsity", 1], "outside [0, 1)"),
        (["--device", "nowhere"], "this machine has none"),
    ],
)
def test_bad_arguments_are_refused(
    tiny: Path, given: list[Any], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(argument) for argument in ["--model", tiny, *SMALL, *given]]) == 2
    captured = capsys.readouterr()
    assert remedy in captured.err and captured.out == ""
