"""Parsers made from dataclasses of options: types, defaults, help, groups, and the dataclass that comes back."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_prunepath import SparsifyConfig
from torch_prunepath.bench.options import DecodeOptions, FFNOptions
from torch_prunepath.commands.cli import COMMANDS
from torch_prunepath.console.options import add_options, documented, flag, number, option, options_of, settings
from torch_prunepath.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    """What settings go to.

    Attributes:
        kind: which of ``"a"`` and ``"b"`` (see :mod:`some.module`).
        share: a number; 5% is much.
        on: whether it is on.
        seed: left out.
    """

    kind: Literal["a", "b"] = "a"
    share: int | float = 0
    on: bool = True
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """First line.

    Attributes:
        place: where, on a line that is so long that it goes on
            in the next one.
        count: how many; ``None`` is none.
    """

    place: Path = option("-p", "--place")
    count: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Base):
    """An example.

    Attributes:
        name: its name.
        long_name: its long name.
        values: some numbers.
        words: words, one at a time.
        how: a word, with another default where none is given.
        quick: whether it is quick.
        mode: one of two.
        this: this, not that.
        that: that, not this.
        inner: settings.

    Raises:
        ValueError: if name is "bad".
    """

    name: str = option(positional=True, metavar="NAME")
    long_name: float = 0.5
    values: Sequence[int] = option("--value", default=(1, 2), nargs="*")
    words: Sequence[str] = option("--word", default=(), action="append")
    how: str | None = option(default=None, nargs="?", const="well", group="a group")
    quick: bool = option(default=False, group="a group")
    mode: Literal["one", "two"] = "one"
    this: int | None = option(default=None, one_of="these", required=True)
    that: int | None = option(default=None, one_of="these")
    inner: Mapping[str, Any] = settings(Inner, "inner things", leave_out=["seed"])

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("bad")


def parse(*words: str) -> Example:
    parser = argparse.ArgumentParser()
    add_options(parser, Example)
    return options_of(Example, parser.parse_args(words))  # type: ignore[no-any-return]


def test_defaults_are_the_dataclass_s() -> None:
    assert parse("n", "-p", "x", "--this", "1") == Example(name="n", place=Path("x"), this=1)


def test_every_kind_of_option() -> None:
    words = ["n", "--place", "x", "--count", "3", "--long-name", "2", "--value", "4", "5", "--word", "a", "--word", "b"]
    words += ["--how", "--quick", "--mode", "two", "--that", "7", "--kind", "b", "--share", "0.5", "--no-on"]
    inner = {"kind": "b", "share": 0.5, "on": False}
    expected = Example(
        name="n", place=Path("x"), count=3, long_name=2.0, values=(4, 5), words=("a", "b"), how="well", quick=True,
        mode="two", that=7, inner=inner,
    )  # fmt: skip
    assert parse(*words) == expected
    # argparse adds to what it finds: a default must not grow from one parse to the next.
    assert parse("n", "-p", "x", "--this", "1").words == ()
    assert parse("n", "-p", "x", "--this", "1", "--value").values == ()
    assert parse("n", "-p", "x", "--this", "1", "--kind", "magic").inner == {"kind": "magic"}, "Inner checks it"


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "x", "--this", "1"],
        ["n", "--this", "1"],
        ["n", "-p", "x"],
        ["n", "-p", "x", "--this", "1", "--that", "2"],
        ["n", "-p", "x", "--this", "1", "--mode", "three"],
        ["n", "-p", "x", "--this", "1", "--seed", "3"],
        ["n", "-p", "x", "--this", "1", "--quick", "yes"],
    ],
)
def test_what_does_not_fit_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2


def test_the_dataclass_checks() -> None:
    with pytest.raises(ValueError, match="bad"):
        parse("bad", "-p", "x", "--this", "1")


def test_help() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Example)
    said = " ".join(parser.format_help().split())
    for part in (
        "NAME its name",
        "-p PLACE, --place PLACE where, on a line that is so long that it goes on in the next one",
        "--count COUNT how many; None is none",
        "--long-name LONG_NAME its long name (default: 0.5)",
        "some numbers (default: 1 2)",
        "--how [HOW] a word, with another default where none is given",
        "a group: --how",
        "--mode {one,two} one of two (default: one)",
        '--kind a|b which of "a" and "b" (see some.module) (default: a)',
        "--share number a number; 5% is much (default: 0)",
        "(--this THIS | --that THAT)",
    ):
        assert part in said, part
    assert "(default: False)" not in said and "(default: None)" not in said


def test_documented() -> None:
    assert set(documented(Example)) == {field.name for field in dataclasses.fields(Example)}
    assert documented(Example)["place"].endswith("goes on in the next one.")
    assert documented(Example)["inner"] == "settings."
    for cls in (SparsifyConfig, TrainConfig):
        assert set(documented(cls)) >= {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_documented(command: str) -> None:
    cls, _ = COMMANDS[command]
    helps = documented(cls)
    assert list(helps) and all(helps[field.name] for field in dataclasses.fields(cls))
    assert set(helps) == {field.name for field in dataclasses.fields(cls)}


def test_options_of_one_benchmark_are_the_other_s_too() -> None:
    shared = {field.name for field in dataclasses.fields(FFNOptions)}
    assert shared < {field.name for field in dataclasses.fields(DecodeOptions)}


@given(st.integers(), st.floats(allow_nan=False))
def test_number_is_the_number_that_was_written(whole: int, real: float) -> None:
    assert number(str(whole)) == whole and isinstance(number(str(whole)), int)
    assert number(repr(real)) == real and isinstance(number(repr(real)), float)


@given(st.from_regex(r"[a-z]+(_[a-z]+)*", fullmatch=True))
def test_flags_of_names(name: str) -> None:
    assert flag(name).removeprefix("--").replace("-", "_") == name
