"""Data by name: files of a folder, or data sets of the hub, with the same fields either way.

A source says what a data set is called, on the hub and in file names, which splits it has and which columns a row
needs. :func:`read` gives the rows of a split from a folder, or from the hub where no folder is named. :func:`gather`
writes what it fetched into a folder, in the files that the benchmarks read, so that one machine with a network serves
others without.

DIR/NAME_SPLIT.jsonl (or .jsonl.gz)     rows as JSON lines, for instance sst2_train.jsonl.gz
DIR/NAME_SPLIT.txt (or .gz, .xz)        running text, for instance wikitext103_test.txt.xz
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.console.output import writing

Row = dict[str, Any]

ROWS, TEXT = "rows", "text"
"""The two forms: rows of JSON lines, or running text."""
SUFFIXES = {ROWS: (".jsonl.gz", ".jsonl"), TEXT: (".txt", ".txt.gz", ".txt.xz", ".raw.txt.gz")}
CONVERTED = "refs/convert/parquet"
"""The hub's own conversion of a data set whose repository holds a loading script, which ``datasets`` no longer runs."""


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: what files are called by, and presets name.
        path: the hub's name, or a folder in the layout of one of its repositories.
        splits: the hub's name of each split, by the name that files have.
        columns: names that every row must have; for running text it is ``text`` alone.
        config: the hub's name of the part, if there are several.
        revision: of the hub's repository; None: the newest.
        form: ``rows`` or ``text``.
        rows: published number of rows of each split, as far as known; what a run costs is estimated from it.
        tokens: mean number of tokens of a training row, for the same estimate; None: not known.

    Raises:
        ValueError: if a field contradicts another.
    """

    name: str
    path: str
    splits: Mapping[str, str]
    columns: tuple[str, ...]
    config: str | None = None
    revision: str | None = None
    form: str = ROWS
    rows: Mapping[str, int] = field(default_factory=dict)
    tokens: float | None = None

    def __post_init__(self) -> None:
        if self.form not in SUFFIXES:
            raise ValueError(f"{self.name}: form={self.form!r} is unknown: choose from {', '.join(SUFFIXES)}")
        if not self.splits or not self.columns:
            raise ValueError(f"{self.name} needs at least one split and one column")
        if self.form == TEXT and self.columns != ("text",):  # the name that datasets gives the lines of a file
            raise ValueError(f"{self.name}: running text is one column called text, not {', '.join(self.columns)}")
        if unknown := sorted(set(self.rows) - set(self.splits)):
            raise ValueError(f"{self.name}: rows are given for {unknown[0]!r}, which is no split of it")

    def files(self, split: str) -> list[str]:
        """Names that the file of a split may have, the one that :func:`gather` writes first."""
        return [f"{self.name}_{split}{suffix}" for suffix in SUFFIXES[self.form]]


def _glue(name: str, *texts: str, dev: str = "validation", rows: tuple[int, int], tokens: float) -> Source:
    """A task of GLUE; its test labels are not public, so that the validation split is what results are measured on."""
    columns = (*texts, "label")
    splits = {"train": "train", "dev": dev}
    numbers = dict(zip(splits, rows, strict=True))
    return Source(name, "nyu-mll/glue", splits, columns, config=name, rows=numbers, tokens=tokens)


PAIR = ("sentence1", "sentence2")
_ALL = (
    # Rows: the cards of the data sets. Tokens: SmolLM2's tokenizer on sst2, mrpc, rte, qnli, mnli and e2e; the others
    # by the bytes that their cards state, at four a token. Special tokens are not counted. Estimates need no more.
    _glue("cola", "sentence", rows=(8_551, 1_043), tokens=11),
    _glue("sst2", "sentence", rows=(67_349, 872), tokens=13),
    _glue("mrpc", *PAIR, rows=(3_668, 408), tokens=54),
    _glue("stsb", *PAIR, rows=(5_749, 1_500), tokens=30),
    _glue("qqp", "question1", "question2", rows=(363_846, 40_430), tokens=32),
    _glue("mnli", "premise", "hypothesis", dev="validation_matched", rows=(392_702, 9_815), tokens=38),
    _glue("qnli", "question", "sentence", rows=(104_743, 5_463), tokens=50),
    _glue("rte", *PAIR, rows=(2_490, 277), tokens=71),
    Source(
        "e2e",
        "tuetschek/e2e_nlg",
        {"train": "train", "valid": "validation", "test": "test"},
        ("meaning_representation", "human_reference"),
        revision=CONVERTED,
        rows={"train": 42_061, "valid": 4_672, "test": 4_693},
        tokens=60,
    ),
    Source(
        "xsum",
        "EdinburghNLP/xsum",
        {"train": "train", "valid": "validation", "test": "test"},
        ("document", "summary"),
        revision=CONVERTED,
        rows={"train": 204_045, "valid": 11_332, "test": 11_334},
        tokens=590,  # 431 words of document and 23 of summary (arXiv 1808.08745, table 1), at 1.3 tokens a word
    ),
    *(
        Source(
            f"wikitext{size}",
            "Salesforce/wikitext",
            {"train": "train", "valid": "validation", "test": "test"},
            ("text",),
            config=f"wikitext-{size}-raw-v1",
            form=TEXT,
            rows={"train": lines, "valid": 3_760, "test": 4_358},
            tokens=tokens,
        )
        for size, lines, tokens in ((2, 36_718, 65.0), (103, 1_801_350, 65.5))  # GPT-2's tokens over all lines
    ),
    Source(
        "tulu2",
        "allenai/tulu-v2-sft-mixture",
        {"train": "train"},
        ("messages",),
        rows={"train": 326_154},
        tokens=950,  # 1.24 GB of text over all rows, by the card, at four bytes a token
    ),
)
SOURCES: Mapping[str, Source] = MappingProxyType({source.name: source for source in _ALL})
"""The data sets of the presets, by name. MMLU is not among them: lm-eval fetches it."""


def source(name: str) -> Source:
    """The source of this name.

    Raises:
        UserError: if there is none.
    """
    if name not in SOURCES:
        raise UserError(f"there is no data set called {name!r}: choose from {', '.join(SOURCES)}")
    return SOURCES[name]


def read(of: Source, split: str, folder: Path | None = None) -> list[Row]:
    """The rows of a split, each with its columns, from a folder's file or, without a folder, from the hub.

    Raises:
        UserError: if the source has no such split, the file or the network is missing, or a row lacks a column.
    """
    if split not in of.splits:
        raise UserError(f"{of.name} has no split {split!r}: choose from {', '.join(of.splits)}")
    found = _from_hub(of, split) if folder is None else _from_folder(of, split, folder)
    if not len(found):
        raise UserError(f"{of.name}, {split}: there is no row: get the data again")
    missing = [name for name in of.columns if name not in found.column_names]
    if missing:
        where = of.path if folder is None else str(folder)
        raise UserError(
            f"{of.name}, {split}: {where} has the columns {', '.join(found.column_names)}, but no {missing[0]!r}: "
            "get the data again, or rename the column"
        )
    rows: list[Row] = found.select_columns(list(of.columns)).to_list()
    for number, row in enumerate(rows, 1):
        empty = [name for name in of.columns if row[name] is None]
        if empty:
            raise UserError(f"{of.name}, {split}: row {number} has no {empty[0]!r}: get the data again")
    return rows


def text_of(of: Source, rows: Iterable[Row]) -> str:
    """Rows of running text as one text; the hub's empty rows were blank lines."""
    (column,) = of.columns
    return "".join(row[column] or " \n" for row in rows)


def gather(sources: Sequence[tuple[Source, Sequence[str]]], folder: Path | None, kept: Path) -> Path:
    """A folder that holds these splits in the files that the benchmarks read, every row of them checked.

    Args:
        sources: each with the splits that are wanted.
        folder: where the files are; None: they are fetched from the hub.
        kept: folder that is filled with what is fetched; what it holds from before is not fetched again.

    Raises:
        UserError: as :func:`read` does, or if nothing can be written.
    """
    for of, splits in sources:
        for split in splits:
            if folder is not None:
                if of.form == ROWS or _file(of, split, folder) is None:  # a text has no columns to check
                    read(of, split, folder)
            elif _file(of, split, kept) is None:
                write(of, split, read(of, split), kept)
    return kept if folder is None else folder


def write(of: Source, split: str, rows: Sequence[Row], folder: Path) -> Path:
    """Keep rows in the file that :func:`read` finds in this folder, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    path = folder / of.files(split)[0]
    part = path.with_name(f".{path.name}.partial")
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        if of.form == TEXT:
            part.write_text(text_of(of, rows), encoding="utf-8", newline="\n")
        else:
            with gzip.open(part, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        part.replace(path)
    return path


def _file(of: Source, split: str, folder: Path) -> Path | None:
    paths = (folder / name for name in of.files(split))
    return next((path for path in paths if path.is_file()), None)


def _from_folder(of: Source, split: str, folder: Path) -> Any:
    path = _file(of, split, folder)
    if path is None:
        raise UserError(
            f"{of.name}, {split}: there is no {' or '.join(of.files(split))} in {folder}: put it there, or leave out "
            f"--data to fetch {of.path} from the hub"
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    how = {"data_files": str(path), "split": "train"}
    try:
        if of.form == TEXT:
            return load_dataset("text", keep_linebreaks=True, **how)
        return load_dataset("json", **how)
    except StopIteration as error:  # what datasets raises for a file without lines
        raise UserError(f"{of.name}, {split}: there is no row in {path}: get it again") from error
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): get it again") from error


def _from_hub(of: Source, split: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(of.path, of.config, split=of.splits[split], revision=of.revision)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"{of.name}, {split}: {of.path} cannot be had from the hub ({one_line(error)}): connect to the network, or "
            f"name a folder that holds {of.files(split)[0]} with --data"
        ) from error
