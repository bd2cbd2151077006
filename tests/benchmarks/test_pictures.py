"""The pictures of docs/: drawn from the records as they are now, and shown with where their numbers come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import pictures
from benchmarks.charts import Line, chart, draw

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOWN = sorted(path.name for path in (DOCS / "pictures").glob("*.svg"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    assert pictures.main(["-o", str(folder)]) == 0
    return folder


def test_pictures_show_what_is_recorded(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == SHOWN and len(SHOWN) == len(pictures.PICTURES)
    for name in SHOWN:
        kept, now = ((folder / name).read_text(encoding="utf-8") for folder in (DOCS / "pictures", drawn))
        assert kept == now, f"docs/pictures/{name} is out of date: run python -m benchmarks pictures"


def test_another_number_is_another_picture(tmp_path: Path) -> None:
    for name, last in (("one", 2.0), ("same", 2.0), ("other", 2.01)):
        with chart(tmp_path / name, "x", "y") as axes:
            axes.set_ylim(0, 3)
            draw(
                axes, [Line("a", [(0.0, 1.0), (1.0, last)], "#000000"), Line("b", [(0.0, (1.0, 1.5, 2.0))], "#000000")]
            )
    one, same, other = ((tmp_path / name).read_text(encoding="utf-8") for name in ("one", "same", "other"))
    assert one == same != other
    assert not re.search(r"<dc:date>|Matplotlib v", one)


def test_rows_that_are_not_there_are_missed() -> None:
    with pytest.raises(LookupError, match="no recorded row"):
        pictures.chosen([{"method": "ours"}], method="theirs")
    with pytest.raises(LookupError, match="no recorded run of ours"):
        pictures._trained("ours", {"high": 2.0})


def test_each_picture_is_shown_with_its_record() -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    figures = [
        re.match(r"[^\]]{20,}\]\(pictures/([\w-]+\.svg)\)\n\n(.*)", text, re.DOTALL) for text in page.split("![")[1:]
    ]
    figures = [(found[1], found[2].partition("\n## ")[0]) for found in figures if found]
    assert sorted(name for name, _ in figures) == SHOWN
    for name, caption in figures:
        records = re.findall(r"\]\(records/([\w-]+\.md)[#)]", caption)
        assert records and all((ROOT / "benchmarks" / "results" / record).is_file() for record in records), name


def test_the_site_has_every_record() -> None:
    links = {path.name for path in (DOCS / "records").iterdir()}
    kept = {path.name for path in (ROOT / "benchmarks" / "results").iterdir() if path.suffix in (".md", ".json")}
    assert links == kept, "run python -m benchmarks pictures"
