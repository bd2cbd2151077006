"""Data by name: from files and from what looks like a repository of the hub, without a network."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.sources import SOURCES, Source, gather, read, source, text_of, write
from torch_prunepath.console.errors import UserError

ROWS = [{"sentence": f"a film {i}", "label": i % 2, "idx": i} for i in range(6)]
LINES = [" = A title = \n", "", " Some words ,\u2028 and more .\n"]
PAGE = " = A title = \n \n Some words ,\u2028 and more .\n"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, and nothing in the user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:  # type: ignore[operator]
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def hub(tmp_path: Path) -> Source:
    """SST-2 whose repository is a folder: ``load_dataset`` takes both alike."""
    folder = tmp_path / "repository"
    for split, rows in (("train", ROWS), ("validation", ROWS[:2])):
        write_lines(folder / f"{split}.jsonl", rows)
    return dataclasses.replace(source("sst2"), path=str(folder), config=None)


def test_rows_are_the_same_from_files_and_from_the_hub(hub: Source, tmp_path: Path) -> None:
    write_lines(tmp_path / "files" / "sst2_train.jsonl.gz", ROWS)
    write_lines(tmp_path / "files" / "sst2_dev.jsonl", ROWS[:2])
    expected = [{"sentence": row["sentence"], "label": row["label"]} for row in ROWS]
    assert read(hub, "train") == read(hub, "train", tmp_path / "files") == expected
    assert read(hub, "dev") == read(hub, "dev", tmp_path / "files") == expected[:2]


def test_what_is_gathered_is_not_fetched_again_and_reads_the_same(hub: Source, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert gather([(hub, ("train", "dev"))], None, kept) == kept
    assert sorted(path.name for path in kept.iterdir()) == ["sst2_dev.jsonl.gz", "sst2_train.jsonl.gz"]
    expected = read(hub, "train")
    gone = dataclasses.replace(hub, path=str(tmp_path / "gone"))
    assert gather([(gone, ("train", "dev"))], None, kept) == kept
    assert read(gone, "train", kept) == expected


def test_a_folder_that_is_named_is_used_as_it_is(hub: Source, tmp_path: Path) -> None:
    files, kept = tmp_path / "files", tmp_path / "kept"
    write_lines(files / "sst2_train.jsonl.gz", ROWS)
    assert gather([(hub, ("train",))], files, kept) == files and not kept.exists()
    with pytest.raises(UserError, match=r"there is no sst2_dev.jsonl.gz or sst2_dev.jsonl in .*leave out --data"):
        gather([(hub, ("train", "dev"))], files, kept)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz", ".raw.txt.gz"])
def test_running_text_keeps_its_blank_lines(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    write_lines(folder / "test.jsonl", [{"text": line} for line in LINES])
    wikitext = dataclasses.replace(source("wikitext2"), path=str(folder), config=None, splits={"test": "test"}, rows={})
    assert text_of(wikitext, read(wikitext, "test")) == PAGE
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(Path(suffix).suffix, open)
    with opener(tmp_path / f"wikitext2_test{suffix}", "wt", encoding="utf-8") as file:
        file.write(PAGE)
    assert text_of(wikitext, read(wikitext, "test", tmp_path)) == PAGE
    written = write(wikitext, "test", read(wikitext, "test"), tmp_path / "kept")
    assert written.name == "wikitext2_test.txt" and written.read_text(encoding="utf-8") == PAGE


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"sentence": st.text(st.characters(codec="utf-8"), min_size=1), "label": st.integers(0, 9)}
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_rows_survive_being_written(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write(source("sst2"), "train", rows, tmp_path)
    with gzip.open(tmp_path / "sst2_train.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        assert [json.loads(line) for line in file.read().split("\n") if line] == rows
    assert read(source("sst2"), "train", tmp_path) == rows


def test_conversations_come_with_their_roles(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    write_lines(tmp_path / "tulu2_train.jsonl", [{"dataset": "x", "id": "1", "messages": said}])
    assert read(source("tulu2"), "train", tmp_path) == [{"messages": said}]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"sentence": "a"}], "has the columns sentence, but no 'label'"),
        ([{"sentence": "a", "label": 1}, {"sentence": None, "label": 0}], "row 2 has no 'sentence'"),
        ([], "cannot be read|there is no row"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "sst2_train.jsonl", rows)
    with pytest.raises(UserError, match=words):
        read(source("sst2"), "train", tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "sst2_train.jsonl").write_text('{"sentence": "a", "lab')
    with pytest.raises(UserError, match=r"sst2_train.jsonl cannot be read .*get it again"):
        read(source("sst2"), "train", tmp_path)


def test_without_network_and_files_the_error_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"nyu-mll/glue cannot be had .*connect.*rte_train.jsonl.gz with --data"):
        read(source("rte"), "train")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="no data set called 'imdb': choose from cola, sst2"):
        source("imdb")
    with pytest.raises(UserError, match="xsum has no split 'dev': choose from train, valid, test"):
        read(source("xsum"), "dev")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"form": "table"}, "form='table' is unknown: choose from rows, text"),
        ({"columns": ()}, "at least one split and one column"),
        ({"splits": {}, "rows": {}}, "at least one split and one column"),
        ({"form": "text"}, "running text is one column"),
        ({"rows": {"all": 3}}, "'all', which is no split"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(source("sst2"), **fields)


def test_the_sources_know_what_their_runs_cost() -> None:
    for name, each in SOURCES.items():
        assert each.name == name and each.rows["train"] > 0 and each.tokens is not None
