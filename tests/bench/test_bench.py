"""``prunepath bench``: arithmetic, the check, what is reported. No test looks at how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama, tiny_llama
from transformers import AutoModelForCausalLM

from torch_prunepath import SparsifyConfig, register_routing_hook, set_tau, sparsify
from torch_prunepath.bench import build, check, modes, profile, prompts, results
from torch_prunepath.bench.decoder import Decoder, Prefill, logits_of, read_prompt
from torch_prunepath.bench.geometry import GEOMETRIES, Geometry
from torch_prunepath.bench.layers import TimedFFN, Usage, random_layer
from torch_prunepath.bench.model_traffic import reach, rounding_noise, traffic, usage, weight_bytes
from torch_prunepath.bench.options import DEFAULT_MODES, DEFAULT_SPARSE_MODES, MODES, FFNOptions
from torch_prunepath.bench.sources import layers_wanted
from torch_prunepath.bench.timing import Timing, Traffic, copy_bandwidth, peak_memory, timed
from torch_prunepath.commands import cli
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.reference import sparse_ffn_reference
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.ops import sparse_ffn as fused
from torch_prunepath.ops.cpu import ffn as cpu
from torch_prunepath.ops.operators import router_scores
from torch_prunepath.select import mask_from_scores

CPU = torch.device("cpu")
SPARSE = SparsifyConfig(expert_size=8, partition="contiguous", router="centroid", budget="uniform")
ROW_KEYS = {"geometry", "device", "dtype", "batch", "sparsity", "dense_us", "sparse_us", "speedup", "floor_speedup"}
ROW_KEYS |= {"kappa", "peak_bytes", "realised_sparsity", "expert_size", "tokens", "phase", "check_error"}
ROW_KEYS |= {"dense_bandwidth_share", "sparse_bandwidth_share", "dense_min_us", "sparse_iqr_us"}
GATED = Geometry("gated", "llama", 24, 70, 2, 2, 1, 64, True, 64)
PLAIN = Geometry("plain", "gpt2", 24, 70, 2, 2, 2, 64, True, 64)


def layer_of(geometry: Geometry, gate_name: str = "one", dtype: torch.dtype = torch.float32, seed: int = 0) -> TimedFFN:
    return random_layer(geometry, dtype, CPU, expert_size=8, gate=gate_name, seed=seed)


def inputs(tokens: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny-sparse"))
    sparsify(tiny_llama(), tau=0.7, config=SPARSE, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run ``prunepath bench``; return its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def refused(result: tuple[int, str, str], code: int, *parts: str) -> None:
    assert result[0] == code
    assert result[1] == ""
    (line,) = [line for line in result[2].splitlines() if line.startswith("prunepath: error: ")]
    for part in parts:
        assert part in line


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_floor_and_kappa() -> None:
    row = Traffic(dense_bytes=1000, sparse_bytes=250, bandwidth=1e9).row(dense_us=10.0, sparse_us=5.0)
    assert row["floor_speedup"] == 4.0
    assert row["speedup"] == 2.0
    assert row["kappa"] == 0.5
    assert row["floor_us"] == pytest.approx(0.25)
    assert row["dense_bytes_per_s"] == pytest.approx(1e8)
    assert row["dense_bandwidth_share"] == pytest.approx(0.1)
    assert row["sparse_bandwidth_share"] == pytest.approx(0.05)


def test_timing_is_per_call() -> None:
    timing = Timing.of([50.0, 10.0, 20.0, 30.0, 40.0], calls=10)
    assert (timing.median_us, timing.min_us, timing.iqr_us, timing.rounds) == (3.0, 1.0, 3.0, 5)


def test_timed_runs_take_turns_after_what_comes_before() -> None:
    seen: list[str] = []
    runs = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    times = timed(runs, CPU, calls=1, seconds=1e-9, before=lambda: seen.append("-"))
    assert "".join(seen[:8]) == "-a-b-a-b"
    assert times["a"].rounds == times["b"].rounds == 5


def test_copy_bandwidth_is_a_positive_number() -> None:
    assert 0 < copy_bandwidth(CPU) < math.inf


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_peak_memory_sees_what_a_block_held() -> None:
    with peak_memory(CPU) as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.growth is not None and peak.bytes is not None
    assert 60 << 20 < peak.growth < 80 << 20
    assert peak.bytes > peak.growth


def test_bytes_of_a_layer() -> None:
    plain, gated = layer_of(PLAIN), layer_of(GATED)
    assert plain.neuron_bytes == 4 * (2 * 70 * 24 + 70)
    assert gated.neuron_bytes == 4 * 3 * 70 * 24
    assert gated.router_bytes == 4 * 9 * 24


def test_usage_counts_neurons_of_the_union() -> None:
    mask_TE = torch.zeros(2, 9, dtype=torch.bool)
    mask_TE[0, 0] = mask_TE[1, 8] = True  # 8 neurons, and the last expert's 6
    used = Usage.of(mask_TE, expert_size=8, ffn_size=70)
    assert used.union == pytest.approx(14 / 70)
    assert used.sparsity == pytest.approx(1 - 7 / 70)


@pytest.mark.parametrize("layers", [None, 3])
def test_layers_exceed_the_cache_at_the_highest_sparsity(layers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(GATED)
    monkeypatch.setattr("torch_prunepath.bench.sources.cache_bytes", lambda device: 10 * layer.neuron_bytes)
    options = FFNOptions(
        geometries=[],
        device="cpu",
        batches=[1],
        prompt_lengths=[],
        sparsities=[0.5, 0.75],
        dtype="fp32",
        expert_size=8,
        gate="one",
        layers=layers,
    )
    count = layers_wanted(layer, options)
    if layers is None:
        read = 0.25 * layer.neuron_bytes + layer.router_bytes
        assert (count - 1) * read < 40 * layer.neuron_bytes <= count * read
    else:
        assert count == 3


# --- sparsity ---------------------------------------------------------------------------------------------------------


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate_name", ["one", "sigmoid"])
@pytest.mark.parametrize("geometry", [GATED, PLAIN], ids=lambda geometry: geometry.name)
def test_the_gate_lets_right_results_pass(geometry: Geometry, gate_name: str, dtype: torch.dtype) -> None:
    layer, x_TD = layer_of(geometry, gate_name, dtype), inputs(20, dtype=dtype)
    for sparsity in (0.0, 0.5, 0.8):
        layer.set_sparsity(x_TD, sparsity)
        for layout in ("linear", "rows"):
            error = check.check_layer(layer, x_TD, layer.dense(x_TD, layout), layer.sparse(x_TD), "FFN")
            assert 0 < error < check.BOUNDS[dtype]


@pytest.mark.parametrize("how", [{"router_norm": True}, {"shared": 3}, {"router_norm": True, "shared": 1}], ids=str)
def test_the_check_knows_what_a_router_reads_and_what_it_does_not_choose(how: dict[str, Any]) -> None:
    plain, x_TD = layer_of(GATED, "sigmoid"), inputs(20)
    x_TD *= torch.logspace(-1, 1, len(x_TD)).unsqueeze(1)
    layer = dataclasses.replace(plain, **how)
    for sparsity in (0.3, 0.5):
        layer.set_sparsity(x_TD, sparsity)
        mask_TE = layer.mask(x_TD)
        assert abs(float(mask_TE.float().mean()) - (1 - sparsity)) < 0.02 and mask_TE[:, : layer.shared].all()
        dense_TD, sparse_TD = layer.dense(x_TD, "rows"), layer.sparse(x_TD)
        check.check_layer(layer, x_TD, dense_TD, sparse_TD, "FFN")
        with pytest.raises(check.WrongResult):
            check.check_layer(plain, x_TD, dense_TD, sparse_TD, "FFN")


def test_the_checks_reference_is_the_librarys() -> None:
    model = tiny_llama().double()
    from torch_prunepath.discover import find_ffns

    view = FFNView(model, find_ffns(model)[0])
    x_TD = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    router_ED = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = TimedFFN(
        up_FD=view.up_FD,
        up_bias_F=None,
        gate_FD=view.gate_FD,
        gate_bias_F=None,
        down_FD=view.down_FD,
        down_bias_D=None,
        down_DF=view.down_FD.t(),
        router_ED=router_ED,
        router_bias_E=None,
        tau=torch.tensor(0.9),
        rule="reach",
        gate_offset=0.5,
        activation="silu",
        expert_size=8,
    )
    with torch.no_grad():
        scores_TE = x_TD @ router_ED.t()
        mask_TE = mask_from_scores(scores_TE, layer.tau, "reach")
        expected_TD = sparse_ffn_reference(view, x_TD, mask_TE, torch.sigmoid(scores_TE + 0.5), 8)
        found_TD = check._Reference(layer, x_TD).sparse(expected_TD)
    assert 0 < mask_TE.float().mean() < 1
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-10, atol=1e-12)


def _drop_an_expert(layer: TimedFFN, x_TD: torch.Tensor) -> torch.Tensor:
    mask_TE = layer.mask(x_TD)
    first = int(mask_TE[0].nonzero()[0])
    rows = slice(first * 8, first * 8 + 8)
    h_TF = torch.nn.functional.silu(x_TD @ layer.gate_FD.t()) * (x_TD @ layer.up_FD.t())  # type: ignore[union-attr]
    return layer.sparse(x_TD) - h_TF[:, rows] @ layer.down_FD[rows]


WRONG = {
    "zeros": lambda layer, x_TD: torch.zeros_like(x_TD),
    "dense": lambda layer, x_TD: layer.dense(x_TD, "rows"),
    "an expert missing": _drop_an_expert,
    "NaN": lambda layer, x_TD: layer.sparse(x_TD) * torch.nan,
    "one NaN, in a token that is not compared": lambda layer, x_TD: layer.sparse(x_TD).index_fill_(
        0, torch.tensor(1), torch.nan
    ),
    "half a percent more": lambda layer, x_TD: 1.005 * layer.sparse(x_TD),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_the_check_stops_wrong_results(wrong) -> None:  # type: ignore[no-untyped-def]
    layer, x_TD = layer_of(GATED), inputs(100)
    layer.set_sparsity(x_TD, 0.7)
    with pytest.raises(check.WrongResult, match="sparse FFN is wrong, so no time is reported"):
        check.check_layer(layer, x_TD, layer.dense(x_TD, "linear"), wrong(layer, x_TD), "FFN")


def test_the_check_stops_a_wrong_dense_result() -> None:
    layer, x_TD = layer_of(GATED), inputs(3)
    with pytest.raises(check.WrongResult, match="dense FFN is wrong"):
        check.check_layer(layer, x_TD, torch.zeros_like(x_TD), layer.sparse(x_TD), "FFN")


@pytest.mark.parametrize("away, passes", [(5e-6, True), (5e-5, False)])
def test_only_experts_at_the_threshold_are_free(away: float, passes: bool) -> None:
    layer, x_TD = layer_of(GATED), inputs(1)
    scores_TE = router_scores(x_TD, layer.router_ED, None)
    ranked_E = torch.softmax(scores_TE[0].double(), -1).sort(descending=True).values
    crossing = 3  # the expert of rank 3 is active iff the mass of ranks 0 to 2 is below tau
    mass = float(ranked_E[:crossing].sum())
    layer.tau.fill_(mass + away)
    with_it = layer.sparse(x_TD)
    layer.tau.fill_(mass - away)
    without_it = layer.sparse(x_TD)
    assert not torch.allclose(with_it, without_it, rtol=1e-2)
    layer.tau.fill_(mass + away)
    dense_TD = layer.dense(x_TD, "rows")
    check.check_layer(layer, x_TD, dense_TD, with_it, "FFN")
    if passes:
        check.check_layer(layer, x_TD, dense_TD, without_it, "FFN")
    else:
        with pytest.raises(check.WrongResult):
            check.check_layer(layer, x_TD, dense_TD, without_it, "FFN")


# --- bench ffn --------------------------------------------------------------------------------------------------------

QUICK = ("--dtype", "fp32", "--seconds", "0.01")


def test_ffn_of_a_geometry(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("ffn", "--geometry", "smollm2-135m", "--layers", 2, "--batch", 1, 3, "--sparsity", 0, 0.8)
    code, stdout, _ = run(*arguments, *QUICK, "--json", "-o", out)
    assert code == 0
    found = json.loads(stdout)
    assert found == json.loads((out / "results.json").read_text())
    assert (out / "speedup.png").stat().st_size > 1000
    assert found["command_line"].startswith("prunepath bench ffn --geometry smollm2-135m")
    assert "random weights" in found["geometries"]["smollm2-135m"]["weights"]
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert [(row["batch"], row["sparsity"]) for row in found["rows"]] == [(1, 0.0), (1, 0.8), (3, 0.0), (3, 0.8)]
    for row in found["rows"]:
        assert row.keys() >= ROW_KEYS
        assert abs(row["realised_sparsity"] - row["sparsity"]) <= 32 / 1536
        assert row["kappa"] == pytest.approx(row["dense_us"] / row["sparse_us"] / row["floor_speedup"])
        read = 3 * 1536 * 576 * 4 * row["union_share"] + 48 * 576 * 4
        assert row["floor_speedup"] == pytest.approx(3 * 1536 * 576 * 4 / read)
    assert found["rows"][3]["union_share"] > 1 - found["rows"][3]["realised_sparsity"]


def test_ffn_of_a_folder_with_its_own_routers(run, tiny: Path, tiny_sparse: Path) -> None:
    code, stdout, _ = run(
        *("ffn", "--geometry", tiny, tiny_sparse, "--sparsity", 0.5, "--batch", 2, "--prompt", 40),
        *("--expert-size", 16, "--json", *QUICK),
    )
    assert code == 0
    found = json.loads(stdout)
    about = found["geometries"]
    assert [about[str(folder)]["routers"] for folder in (tiny, tiny_sparse)] == ["random", "own"]
    assert [about[str(folder)]["expert_size"] for folder in (tiny, tiny_sparse)] == [16, 8]
    assert [row["phase"] for row in found["rows"]] == ["ffn", "prefill"] * 2
    for row in found["rows"]:
        assert abs(row["realised_sparsity"] - 0.5) <= row["expert_size"] / 64


def test_a_wrong_operator_yields_no_times(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.sparse_ffn
    monkeypatch.setattr(fused, "sparse_ffn", lambda *arguments: 1.01 * right(*arguments))
    result = run("ffn", "--geometry", "smollm2-135m", "--layers", 2, "--sparsity", 0.8, "--json", *QUICK)
    refused(result, 1, "sparse FFN of smollm2-135m", "no time is reported")


def test_table_and_plot_lines(run) -> None:
    code, stdout, _ = run("ffn", "--geometry", "smollm2-135m", "--layers", 2, "--sparsity", 0.5, *QUICK)
    assert code == 0
    head, row = (line.split() for line in stdout.splitlines()[-2:])
    assert head[:4] == ["dtype", "what", "sparsity", "real"]
    assert head[-6:] == ["dense", "bw", "sparse", "bw", "peak", "MB"]
    assert row[:4] == ["smollm2-135m", "fp32", "batch", "1"]
    rows = [
        {"geometry": "g", "phase": "decode", "batch": b, "tokens": 1, "realised_sparsity": s}
        for b, s in ((1, 0.8), (1, 0.5), (2, 0.5))
    ]
    lines = results.lines_of(rows)
    assert {label: [row["realised_sparsity"] for row in group] for label, group in lines.items()} == {
        "g, batch 1": [0.5, 0.8],
        "g, batch 2": [0.5],
    }


@pytest.mark.parametrize("which", ["", "ffn", "decode"])
def test_help(which: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *which.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: prunepath bench {which}".strip() in capsys.readouterr().out


@pytest.mark.parametrize("which", ["ffn", "decode"])
def test_an_unknown_geometry_is_refused_with_the_names(run, which: str) -> None:
    refused(run(which, "--geometry", "gpt5"), 2, "'gpt5'", *GEOMETRIES)


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("ffn", "--sparsity", 1), "--sparsity 1"),
        (("ffn", "--batch", 0), "--batch"),
        (("ffn", "--batch"), "nothing to time"),
        (("ffn", "--seconds", 0), "--seconds"),
        (("decode", "--new-tokens", 0), "--new-tokens"),
        (("decode", "--modes", "fast"), "reduce-overhead"),
        (("decode", "--modes", "graph"), "CUDA graph"),
        (("decode", "--backend", "nothing"), "nothing"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(run, arguments: tuple[object, ...], part: str) -> None:
    kind, *rest = arguments
    refused(run(kind, "--geometry", "smollm2-135m", *rest), 2, part)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(run) -> None:
    refused(run("ffn", "--geometry", "smollm2-135m", "--device", "cuda"), 2, "no CUDA device")


def test_defaults_name_known_modes() -> None:
    for names in (*DEFAULT_MODES.values(), *DEFAULT_SPARSE_MODES.values()):
        assert set(names) <= set(MODES)


# --- whole models -----------------------------------------------------------------------------------------------------

PARAMETERS = {
    "gpt2-medium": 354_823_168,
    "smollm2-135m": 134_515_008,
    "qwen2-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2-7b": 7_615_616_512,
    "llama-3-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GEOMETRIES[name].config())
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_weights_that_a_step_reads() -> None:
    for tied in (True, False):
        geometry = Geometry("g", "llama", 16, 24, 1, 2, 1, 50, tied, 32)
        model = AutoModelForCausalLM.from_config(geometry.config())
        every = sum(parameter.nbytes for parameter in model.parameters())
        assert weight_bytes(model) == (every if tied else every - 50 * 16 * 4)


def decoder_of(model, batch: int = 2, context: int = 6, new_tokens: int = 5) -> Decoder:  # type: ignore[no-untyped-def]
    return Decoder(model, build.random_ids(model, batch, context + new_tokens + 1, seed=0), new_tokens)


@torch.no_grad()
def test_steps_compute_what_a_whole_forward_does() -> None:
    model = tiny_llama()
    work = decoder_of(model)
    first = logits_of(work, work.step, 5)
    expected_BNV = model(input_ids=work.ids()).logits[:, -5:]
    torch.testing.assert_close(first, expected_BNV.transpose(0, 1).flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(work, work.step, 5), first, rtol=0, atol=0)
    assert torch.equal(work.chosen_B1, first[-2:].argmax(-1, keepdim=True))


@torch.no_grad()
def test_a_shorter_prompt_after_a_longer_one() -> None:
    model = tiny_llama()
    work = decoder_of(model, batch=1, context=12)
    ids_1C = build.random_ids(model, 1, 4 + 5 + 1, seed=3)
    work.begin(ids_1C, read_prompt)
    found = logits_of(work, work.step, 5)
    torch.testing.assert_close(found, model(input_ids=ids_1C[:, :-1]).logits[0, -5:], rtol=1e-4, atol=1e-5)


def test_realised_sparsity_of_a_whole_model() -> None:
    model = sparsify(tiny_llama(), tau=1.0, config=SPARSE, progress=False)
    for work in (decoder_of(model), Prefill(model, build.random_ids(model, 1, 20, 0))):
        used = reach(model, work, 0.5, 5)
        assert set(used) == set(sparse_layers(model))
        assert Usage.mean(list(used.values())).sparsity == pytest.approx(0.5, abs=8 / 64)
        again = usage(model, work, 5)
        assert again == used
    assert Usage.mean(list(reach(model, work, 0.0, 5).values())).sparsity == 0.0


def test_bytes_of_a_sparse_step() -> None:
    model = tiny_llama()
    dense_bytes = weight_bytes(model)
    sparsify(model, tau=1.0, config=SPARSE, progress=False)
    work = decoder_of(model)
    cache = 2 * 2 * 2 * 11 * 16 * 4  # layers, keys and values, batch, tokens, head, float32
    assert work.cache_bytes == cache
    ffn, router = 3 * 64 * 32 * 4, 8 * 32 * 4
    used = {name: Usage(sparsity=0.75, union=0.25) for name in sparse_layers(model)}
    about = traffic(model, work, used, dense_bytes, 1e9)
    assert about.dense_bytes == dense_bytes + cache
    assert about.sparse_bytes == dense_bytes + cache - 2 * 0.75 * ffn + 2 * router


def test_rounding_noise_is_small_and_leaves_the_model_alone() -> None:
    model = sparsify(tiny_llama(), tau=0.5, config=SPARSE, progress=False)
    work = decoder_of(model)
    expected_RV = logits_of(work, work.step, 3)
    assert 0 < rounding_noise(sparse_layers(model).values(), work, expected_RV, 3, seed=0) < 1e-4
    assert torch.equal(logits_of(work, work.step, 3), expected_RV)


@torch.no_grad()
def test_random_routers_spread_as_they_should() -> None:
    model = sparsify(tiny_llama(), tau=1.0, config=SPARSE, progress=False)
    build._randomise_routers(model, seed=0)
    spreads = []
    with register_routing_hook(model, lambda r: spreads.append(float(r.scores_TE.std(-1).mean()))):
        model(input_ids=build.random_ids(model, 1, 64, 0))
    assert spreads == pytest.approx([3.0, 3.0], rel=1e-4)


EAGER = ("--modes", "eager", "--sparse-modes", "eager", "--context", 8, "--new-tokens", 4, *QUICK)


def test_decode(run, tiny: Path, tiny_sparse: Path) -> None:
    code, stdout, _ = run(
        *("decode", "--geometry", tiny, tiny_sparse, "--batch", 1, 2, "--prompt", 16, 4096, "--sparsity", 0.5),
        *("--expert-size", 16, "--prompts", 2, "--json", *EAGER),
    )
    assert code == 0
    found = json.loads(stdout)
    shown = [(row["phase"], row["batch"], row["tokens"], row["sparsity"]) for row in found["rows"]]
    works = (("decode", 1, 1), ("decode", 2, 1), ("prefill", 1, 16))
    assert shown == [(*work, s) for work in works for s in (0.0, 0.5)] * 2
    assert [row["expert_size"] for row in found["rows"]] == [16] * 6 + [8] * 6
    for row in found["rows"]:
        assert row.keys() >= ROW_KEYS | {"dense_tokens_per_s", "sparse_tokens_per_s", "check_bound", "dense_modes_us"}
        assert row["check_error"] <= row["check_bound"] <= 1e-3
        assert row["realised_sparsity"] == pytest.approx(row["sparsity"], abs=row["expert_size"] / 64)
    assert len(found["skipped"]) == 2 and "4096" in found["skipped"][0]
    assert [(p["prompt"], p["prompt_tokens"]) for p in found["prompts"]] == [(0, 8), (1, 8)] * 2
    assert all(p["realised_sparsity"] == pytest.approx(0.5, abs=0.25) for p in found["prompts"])
    assert all(p["sparse_latency_ms"] > 0 and p["dense_tokens_per_s"] > 0 for p in found["prompts"])


def test_decode_with_sigmoid_gates(run, tiny: Path) -> None:
    """At tau = 1 the model is not the dense one: eager sparse calls are what steps are compared with."""
    code, stdout, _ = run("decode", "--geometry", tiny, "--gate", "sigmoid", "--sparsity", 0.5, "--json", *EAGER)
    assert code == 0
    rows = json.loads(stdout)["rows"]
    assert [row["gate"] for row in rows] == ["sigmoid"] * 2
    assert rows[0]["dense_distance"] > 0.1


@pytest.mark.slow
def test_decode_compiled(run, tmp_path: Path) -> None:
    code, stdout, _ = run(
        *("decode", "--geometry", "smollm2-135m", "--layers", 2, "--sparsity", 0.8, "--prompt", 24, "--prompts", 2),
        *("--backend", "inductor", "--context", 20, "--new-tokens", 4, "-o", tmp_path / "out", *QUICK),
    )
    assert code == 0
    assert "prefill 24" in stdout and "prompt 1 (20 tokens)" in stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["sparse_mode"] for row in found["rows"]] == ["default"] * 4


def test_a_profile_says_where_a_step_goes(run, tiny: Path, tmp_path: Path) -> None:
    place = tmp_path / "profile.txt"
    place.write_text("of an earlier run")
    asked = ("decode", "--geometry", tiny, "--sparsity", 0.5, "--profile", place, *EAGER)
    code, stdout, _ = run(*asked)
    assert code == 0
    assert f"profile    {place}" in stdout
    start = rf"^(?:dense|sparse) {re.escape(str(tiny))}, decoding at batch 1"
    sides = re.split(start, place.read_text(), flags=re.MULTILINE)
    assert [side.partition(": ")[0] for side in sides] == [
        "", ", mode eager", ", sparsity 0, mode eager", ", sparsity 0.5, mode eager",
    ]  # fmt: skip
    for side, sparse in zip(sides[1:], (False, True, True), strict=True):
        rows = {cells[0]: cells[1:] for cells in map(str.split, side.splitlines()[3:]) if cells}
        assert (rows["aten::linear"][0] == "15") is not sparse  # 7 of each layer, and the output layer
        *each, (calls, total) = rows.values()
        assert calls == str(sum(int(row[0]) for row in each))
        assert float(total) == pytest.approx(sum(float(row[1]) for row in each), abs=0.1 * len(each))
        assert [float(row[1]) for row in each] == sorted((float(row[1]) for row in each), reverse=True)
        assert rows["aten::scaled_dot_product_attention"][0] == "2"  # one step of two layers


def test_a_profile_leaves_the_decoder_where_it_was() -> None:
    work = decoder_of(tiny_llama(), batch=1)
    expected = logits_of(work, work.step, 5)
    assert profile.entries_of(work, work.step, CPU)
    assert torch.equal(torch.cat(work.turn(work.step)), expected)


def test_long_names_are_cut() -> None:
    text = profile.render("title", [profile.Entry("k" * 200, 4, 30.0), profile.Entry("b", 1, 10.0)])
    title, _, _, long, short, every = text.splitlines()[:6]
    assert title == "title"
    assert long.split() == ["k" * 96, "...", "4", "30.0", "7.5", "75.0%"]
    assert short.split() == ["b", "1", "10.0", "10.0", "25.0%"]
    assert every.split() == ["all", "5", "40.0"]


def test_a_profile_that_cannot_be_kept_is_refused(run, tiny: Path, tmp_path: Path) -> None:
    asked = ("decode", "--geometry", tiny, "--sparsity", 0.5, *EAGER)
    refused(run(*asked, "--profile", tmp_path / "none" / "profile.txt"), 2, "cannot write", "--profile")
    refused(run(*asked, "--profile", tmp_path / "out" / "profile.txt", "-o", tmp_path / "out"), 2, "--output replaces")
    assert not list(tmp_path.iterdir())


def test_a_profiler_that_sees_nothing_is_no_profile(run, tiny: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("torch.profiler.profile.key_averages", lambda self: [])
    asked = ("decode", "--geometry", tiny, "--sparsity", 0.5, "--profile", tmp_path / "profile.txt", *EAGER)
    refused(run(*asked), 2, "sees nothing", "leave --profile out")


def test_a_step_that_differs_from_eager_yields_no_times(run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(work, modes, backend, what):  # type: ignore[no-untyped-def]
        return {"eager": work.step if what.startswith("dense") else lambda: 1.01 * work.step()}

    monkeypatch.setattr("torch_prunepath.bench.decode.ready_steps", ready)
    refused(run("decode", "--geometry", tiny, "--sparsity", 0.5, *EAGER), 1, "sparse", "mode eager", "no time")


def test_a_sparse_model_that_is_not_dense_at_tau_1_yields_no_times(
    run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpu.sparse_ffn
    monkeypatch.setattr(cpu, "sparse_ffn", lambda *args: 1.01 * right(*args))
    refused(run("decode", "--geometry", tiny, "--sparsity", 0.5, *EAGER), 1, "at sparsity 0", "no time is reported")


def test_nan_never_passes_the_check_of_whole_models() -> None:
    with pytest.raises(check.WrongResult):
        check.require(math.nan, 0.5, "it")
    model = tiny_llama()
    work = decoder_of(model)
    expected_RV = logits_of(work, work.step, modes.CHECKED_CALLS)
    with pytest.raises(check.WrongResult):
        modes.check_steps(work, {"eager": lambda: work.step() * math.nan}, expected_RV, 0.5, "it")


def test_layers_are_for_geometries_only(run, tiny: Path) -> None:
    refused(run("decode", "--geometry", tiny, "--layers", 1, *EAGER), 2, "--layers")


def test_rows_are_told_as_they_come(run, tiny: Path) -> None:
    _, stdout, stderr = run("ffn", "--geometry", tiny, "--sparsity", 0.5, "--seconds", 0.01, "--json")
    (row,) = json.loads(stdout)["rows"]
    assert f"{row['dense_us']:.1f}  {row['sparse_us']:.1f}" in stderr


def test_prompt_lengths() -> None:
    assert prompts.lengths(3, 100) == [16, 58, 100]
    assert prompts.lengths(1, 100) == [16]
    assert prompts.lengths(2, 8) == [8, 8]


def test_tau_stays_where_the_search_left_it() -> None:
    model = sparsify(tiny_llama(), tau=0.3, config=SPARSE, progress=False)
    set_tau(model, 0.3)
    work = decoder_of(model)
    used = reach(model, work, 0.5, 5)
    assert usage(model, work, 5) == used


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["ffn", "decode"])
def test_on_cuda(run, which: str, tmp_path: Path) -> None:
    asked = ("--geometry", "smollm2-135m", "--layers", 2, "--device", "cuda", "--batch", 1, 4, "--sparsity", 0.8)
    more = ("--context", 16, "--new-tokens", 8, "--backend", "inductor", "--modes", "graph", "reduce-overhead")
    more = (*more, "--profile", tmp_path / "profile.txt")
    code, stdout, _ = run(which, *asked, *(more if which == "decode" else ()), "--seconds", 0.05, "--json")
    assert code == 0
    if which == "decode":  # the kernels inside a recorded graph
        assert (tmp_path / "profile.txt").read_text().count("\ntriton_") > 4
    for row in json.loads(stdout)["rows"]:
        assert row["device"] == "cuda" and row["dtype"] == "bf16"
        assert 0 < row["dense_us"] < 1e6 and 0 < row["sparse_us"] < 1e6
        assert row["peak_bytes"] > 0
