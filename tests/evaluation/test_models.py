from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llama import save_tiny_llama

from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation import models
from torch_prunepath.evaluation.models import (
    SMOLLM2,
    WheelModel,
    cache_folder,
    fetch,
    load_gguf,
    load_model,
    longest_context,
)

CONTENT = b"GGUF" + bytes(range(256)) * 40
FAKE = WheelModel("fake", "fake-model-wheel==1.0", "fake/model.gguf", hashlib.sha256(CONTENT).hexdigest(), 1)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where pip looks: a folder that holds the wheel of ``FAKE``."""
    folder = tmp_path / "index"
    folder.mkdir()
    put_wheel(folder, {FAKE.member: CONTENT})
    use_index(monkeypatch, folder)
    return folder


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def put_wheel(folder: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / "fake_model_wheel-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        info = "fake_model_wheel-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-model-wheel\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def no_subprocess(*_, **__):
    raise AssertionError("the network was used")


def test_fetch_downloads_once(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    path = fetch(FAKE, cache)
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    monkeypatch.setattr(subprocess, "run", no_subprocess)
    assert fetch(FAKE, cache) == path


def test_what_a_killed_download_left_goes_with_the_next(tmp_path: Path, index: Path) -> None:
    leftover = tmp_path / "cache" / f".{Path(FAKE.member).name}.abcdefgh.partial"
    leftover.mkdir(parents=True)
    (leftover / "part").write_bytes(b"half of it")
    path = fetch(FAKE, tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [path.name]


def test_a_damaged_cache_is_replaced(tmp_path: Path, index: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(CONTENT[:-1])
    assert fetch(FAKE, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_stores_nothing(tmp_path: Path, index: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"expected model.gguf \(SHA-256 differs\).*--model"):
        fetch(replace(FAKE, sha256="0" * 64), cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("members", [{"fake/other.gguf": CONTENT}, {}], ids=["other file", "no file"])
def test_another_wheel_of_that_name(tmp_path: Path, index: Path, members: dict[str, bytes]) -> None:
    put_wheel(index, members)
    with pytest.raises(UserError, match=r"not the expected wheel.*--model"):
        fetch(FAKE, tmp_path / "cache")


def test_no_network(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "0", "TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(
        UserError, match=r"cannot download fake-model-wheel==1.0 .*check the network.*--model"
    ) as caught:
        fetch(FAKE, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("place", ["copyfileobj", "pip"])
def test_no_room_on_disk(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    message = os.strerror(errno.ENOSPC)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, message)

    def pip_fails(command, **_):
        return subprocess.CompletedProcess(command, 1, "", f"ERROR: Could not install: [Errno 28] {message}\n")

    if place == "pip":
        monkeypatch.setattr(subprocess, "run", pip_fails)
    else:
        monkeypatch.setattr(models.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=r"no room on disk for .*cache: free some, or point XDG_CACHE_HOME"):
        fetch(FAKE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupted_download_stores_nothing(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(models.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(FAKE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, index: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*XDG_CACHE_HOME"):
        fetch(FAKE, tmp_path / "file" / "cache")


def test_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    with pytest.raises(UserError, match=r"ensurepip.*--model"):
        fetch(FAKE, tmp_path)


def test_downloading_leaves_setuptools_fit_for_use(tmp_path: Path, index: Path) -> None:
    """Looking pip up in the process would switch off setuptools' distutils, which torch.compile needs."""
    script = f"""
import importlib, sys
from pathlib import Path
from torch_prunepath.evaluation.models import WheelModel, fetch
fetch({FAKE!r}, Path({str(tmp_path / "cache")!r}))
import setuptools
assert "_distutils" in importlib.import_module("distutils.core").__file__
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("value", "expected"), [("/x/y", "/x/y"), ("", "~/.cache"), ("relative", "~/.cache")])
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == Path(expected).expanduser() / "torch_prunepath"


def test_load_model_from_a_folder(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(save_tiny_llama(tmp_path)))
    assert not model.training and longest_context(model) == 128
    assert tokenizer.decode(tokenizer("naïve")["input_ids"]) == "naïve"


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def name_another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


@pytest.mark.parametrize("damage", [remove_config, remove_tokenizer, truncate_weights, name_another_model])
def test_a_folder_that_holds_no_causal_model(tmp_path: Path, damage) -> None:
    damage(save_tiny_llama(tmp_path))
    with pytest.raises(UserError, match=r"cannot load the model .*give a folder") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such-model", "not a name!", "/no/such/folder"])
def test_no_such_model(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load the model .*Hugging Face hub, which needs a network"):
        load_model(name)


def test_gguf_file_that_is_missing_or_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_model(str(tmp_path / "model.gguf"))
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"model.gguf"):
        load_gguf(tmp_path / "model.gguf")


def test_gguf_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(UserError, match=r"needs gguf: pip install 'torch-prunepath\[quickstart\]'"):
        load_gguf(tmp_path / "model.gguf")


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_loads_as_an_ordinary_model_that_can_be_saved(tmp_path: Path) -> None:
    model, tokenizer = load_gguf(fetch(SMOLLM2, cache_folder()))
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_model(str(tmp_path))
    prompt = tokenizer_again("The capital of France is", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [tokenizer("The capital of France is")["input_ids"]]
    with torch.inference_mode():
        logits = model(**prompt).logits
        assert torch.equal(logits, again(**prompt).logits)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
