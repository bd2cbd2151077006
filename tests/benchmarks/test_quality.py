"""Quality without training: rows at exact sparsities, and what static removal scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama, save_tiny_texts, tiny_llama

from benchmarks import quality
from benchmarks.__main__ import main
from torch_prunepath import SparsifyConfig
from torch_prunepath.discover import find_ffns
from torch_prunepath.evaluation.perplexity import mean_loss, perplexity
from torch_prunepath.inputs.data import as_inputs
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer.ffn import FFNView

WINDOW_NC = torch.randint(3, 200, (6, 32), generator=torch.Generator().manual_seed(0))


def bench(targets: list[float]) -> quality.Bench:
    model = tiny_llama()
    return quality.Bench(model, as_inputs(WINDOW_NC, model), WINDOW_NC, targets)


def test_every_kind_of_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_llama(tmp_path / "tiny")
    save_tiny_texts(tmp_path)
    given = ["--model", model, "--calibration", tmp_path / "train.txt", "--test", tmp_path / "test.txt"]
    given += ["--windows", 2, "--context", 32, "--calibration-tokens", 256, "--sizes", 8, "--sparsity", 0.1, 0.3]
    given += ["--partitions", "coactivation", "--routers", "fitted", "--device", "cpu", "--out", tmp_path / "out.json"]
    assert main(["quality", *map(str, given), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    methods = [row["method"] for row in results["rows"]]
    assert methods == ["static, norm", "static, wanda", "static, wanda-down", "oracle", "routed", "routed"]
    for row in results["rows"]:
        assert all(math.isfinite(row["perplexity"][share]) and row["perplexity"][share] > 1 for share in ("0.1", "0.3"))


def test_perplexity_is_read_off_at_the_sparsity_asked_for() -> None:
    found = bench([0.2, 0.4])
    points: dict[float, quality.Point] = {}
    with found.converted(SparsifyConfig(2, "random", "centroid", budget="uniform")):
        for target in found.targets:
            point = found.at(target, points)
            measured = found.point(point.tau)
            assert point.sparsity == pytest.approx(target, abs=quality.TOLERANCE)
            assert measured.sparsity == pytest.approx(target, abs=2 * quality.TOLERANCE)
            assert point.log_ppl == pytest.approx(measured.log_ppl, abs=0.05)


def test_wanda_s_scores_are_sums_over_all_weights_of_a_neuron() -> None:
    found = bench([0.5])
    model, inputs = found.model, {}
    views = [FFNView(model, spec) for spec in find_ffns(model)]
    visit_inputs(model, views, found.calibration, lambda view, x_ND: inputs.update({view.site: x_ND.clone()}))
    scores = {kind: quality.static_scores(found, kind) for kind in quality.STATIC}
    for view in views:
        x_ND = inputs[view.site].double()
        h_NF = view.hidden(x_ND.float()).double()
        into_F = sum(rows.double().abs() @ x_ND.square().mean(0).sqrt() for rows in (view.gate_FD, view.up_FD))
        down_F = h_NF.square().mean(0).sqrt() * view.down_FD.double().abs().sum(-1)
        torch.testing.assert_close(scores["wanda-down"][view.site], down_F, rtol=1e-4, atol=0)
        torch.testing.assert_close(scores["wanda"][view.site], down_F + into_F, rtol=1e-4, atol=0)
        norm_F = h_NF.abs().mean(0) * view.down_FD.double().norm(dim=-1)
        torch.testing.assert_close(scores["norm"][view.site], norm_F, rtol=1e-4, atol=0)


def test_perplexity_of_batches_is_that_of_windows_read_one_by_one() -> None:
    model = tiny_llama()
    assert math.exp(mean_loss(model, WINDOW_NC, rows=4)) == pytest.approx(perplexity(model, WINDOW_NC), rel=1e-5)
