"""Four threads on every kind of FFN, for a minute in all; ``threads.py`` asks longer."""

from __future__ import annotations

import time

import pytest

from tests.stress.threads import ALL_SPLIT, run, server

SECONDS = 60
"""For all models together."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ALL_SPLIT, "bert adapter"])
def test_four_threads_answer_like_one(name: str) -> None:
    alone = server(name)
    end = time.perf_counter() + SECONDS / (len(ALL_SPLIT) + 2)
    while time.perf_counter() < end:
        assert run([alone], 200, 4) == {f"{name}: right": 200}


@pytest.mark.slow
def test_several_models_in_one_process() -> None:
    servers = [server(name) for name in ("bert", "opt", "llama", "bert adapter")]
    found = run(servers, 800, 4)
    assert found == {f"{each.name}: right": 200 for each in servers}
