from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from torch_prunepath.console.errors import UserError
from torch_prunepath.console.output import check_room, output_folder, writing


def ours(folder: Path) -> bool:
    return (folder / "ours").exists()


def write(path: Path, content: str) -> None:
    with output_folder(path, ours=ours) as folder:
        (folder / "ours").write_text(content)


def test_new_empty_and_own_folders_are_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "new", tmp_path / "empty"):
        for content in ("first", "second"):
            write(path, content)
            assert [(file.name, file.read_text()) for file in path.iterdir()] == [("ours", content)]
        assert [other.name for other in path.parent.iterdir() if other.name.endswith(".partial")] == []


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_the_earlier_output(tmp_path: Path, interruption: type[BaseException]) -> None:
    write(tmp_path / "out", "first")
    with pytest.raises(interruption), output_folder(tmp_path / "out", ours=ours) as folder:
        (folder / "ours").write_text("half")
        raise interruption
    assert (tmp_path / "out" / "ours").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("precious")


def make_link(path: Path) -> None:
    target = path.with_name("target")
    target.mkdir()
    (target / "ours").touch()
    path.symlink_to(target)


@pytest.mark.parametrize("make", [make_file, make_folder, make_link])
def test_what_is_not_ours_is_refused_and_kept(tmp_path: Path, make) -> None:
    path = tmp_path / "out"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="not an earlier output of this command: remove it, or choose"):
        write(path, "x")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(UserError, match="not an earlier output"), output_folder(path, ours=ours):
        make_folder(path)
    assert (path / "precious").read_text() == "precious"


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*choose another place with --output"):
        write(tmp_path / "file" / "out", "x")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk(error: Exception) -> None:
    with (
        pytest.raises(UserError, match="no room on disk for /somewhere: free some, or choose another"),
        writing(Path("/somewhere")),
    ):
        raise error


def test_check_room(tmp_path: Path) -> None:
    check_room(tmp_path, 1, tmp_path)
    with pytest.raises(UserError, match="MB needed"):
        check_room(tmp_path, 1 << 60, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:868] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_errors_of_other_types_while_writing(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers and torch.save say what the system says in types of their own."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=f"no room on disk for {tmp_path}: free some"), writing(tmp_path):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), writing(tmp_path):
        raise RuntimeError("a bug")


def test_folders_made_for_nothing_go(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "there" / "a" / "b" / "out", ours=ours):
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_leftovers_of_killed_runs_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from torch_prunepath.console.output import output_folder
with output_folder(Path({str(tmp_path / "out")!r}), ours=lambda _: True) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""
    runs = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [Path(run.stdout.readline().strip()) for run in runs if run.stdout is not None]
    other = tmp_path / ".out.precious.text.partial"
    other.mkdir()
    try:
        runs[0].kill()
        runs[0].wait()
        assert all((folder / "half").exists() for folder in folders), "SIGKILL leaves it"
        write(tmp_path / "out", "x")
        assert [folder.exists() for folder in folders] == [False, True]
    finally:
        for run in runs:
            run.kill()
            run.wait()
            assert run.stdout is not None
            run.stdout.close()
    write(tmp_path / "out", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.precious.text.partial", "out"]


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    leftover = tmp_path / ".out.abcdefgh.partial"
    leftover.mkdir()
    monkeypatch.setattr("torch_prunepath.console.output.fcntl.flock", flock)
    write(tmp_path / "out", "x")
    assert leftover.exists() and (tmp_path / "out" / "ours").exists(), "nobody knows whether it is in use"
