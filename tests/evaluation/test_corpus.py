from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import byte_tokenizer

from torch_prunepath.console.errors import UserError
from torch_prunepath.evaluation.corpus import Corpus, fit_and_test, help_topics, load_corpus, text_file, windows


def test_help_topics_share_no_paragraph_between_the_parts() -> None:
    corpus = help_topics()
    parts = (corpus.calibration, corpus.held_out)
    fit, test = ({" ".join(paragraph.split()) for paragraph in part.split("\n\n")} - {""} for part in parts)
    assert len(fit) > 500 and len(test) > 100
    assert not fit & test


def test_help_topics_are_the_same_in_another_process() -> None:
    script = "from torch_prunepath.evaluation.corpus import help_topics; import hashlib, sys; c = help_topics(); "
    script += "sys.stdout.write(hashlib.sha256((c.calibration + '|' + c.held_out).encode()).hexdigest())"
    environments = [{"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    runs = [
        subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True)
        for env in environments
    ]
    assert len(runs[0].stdout) == 64
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.parametrize(
    "text",
    ["a b\n\n" * 400, "one line without an end " * 100, "x" * 900 + "\n\n" + "y" * 100],
    ids=["paragraphs", "no paragraphs", "one late paragraph"],
)
def test_text_file_is_cut_in_two(tmp_path: Path, text: str) -> None:
    path = tmp_path / "text"
    path.write_text(text)
    corpus = text_file(path)
    assert corpus.calibration + corpus.held_out == text
    assert 0.18 * len(text) <= len(corpus.held_out) <= 0.26 * len(text)


def test_text_is_cut_where_a_paragraph_ends(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("some words\n\n" * 100)
    assert text_file(path).held_out.startswith("\n\nsome words")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"caf\xe9 au lait"), "not UTF-8"),
    ],
    ids=["missing", "folder", "latin-1"],
)
def test_unreadable_text_is_one_line_with_a_remedy(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "text"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_windows_do_not_overlap_and_spread_over_the_text() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(1003))
    tokenizer = byte_tokenizer()
    got = windows(text, tokenizer, context=10, count=7, part="text")
    assert got.shape == (7, 10) and got.dtype == torch.int64
    all_windows = windows(text, tokenizer, context=10, count=1000, part="text")
    assert tokenizer.decode(all_windows.flatten()) == text[:1000]
    places = [next(i for i in range(100) if torch.equal(all_windows[i], window)) for window in got]
    # The alphabet repeats every 13 windows of 10, so a place is known up to that.
    expected = [round(i * 99 / 6) for i in range(7)]
    assert [place % 13 for place in places] == [place % 13 for place in expected]


def test_windows_of_too_short_a_text() -> None:
    with pytest.raises(UserError, match="held-out text is too short: it has 9 tokens, and at least 10 are needed"):
        windows("123456789", byte_tokenizer(), context=10, count=1, part="held-out text")


@pytest.mark.parametrize(
    ("longest", "tokens", "shapes"), [(64, 640, [(10, 64), (8, 64)]), (4096, 3, [(1, 512), (4, 512)])]
)
def test_fit_and_test_sizes(longest: int, tokens: int, shapes: list[tuple[int, int]]) -> None:
    corpus = Corpus("x", "fit " * 2000, "test " * 500)
    fit, test = fit_and_test(corpus, byte_tokenizer(), longest=longest, tokens=tokens)
    assert [tuple(fit.shape), tuple(test.shape)] == shapes
