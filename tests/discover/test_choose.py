"""FFNs are chosen by name, pattern or function; a mistake in the choice names what there is."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from architectures import Gated, Plain, Stack
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from torch import nn
from torch.nn import functional as F

from torch_prunepath.config import FFNSpec
from torch_prunepath.discover import discover, find_ffns
from torch_prunepath.discover.choose import choose, listed, matches


class Both(nn.Module):
    """Two parts with FFNs, of which one has twelve layers."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = Stack(Plain(16, 37, F.relu), Plain(16, 37, F.relu))
        self.text = Stack(*(Gated(16, 24, True) for _ in range(12)))


def names(model: nn.Module, **choice: Any) -> list[str]:
    return [spec.name for spec in find_ffns(model, **choice)]


TEXT = [f"text.ffns.{i}" for i in range(12)]
VISION = ["vision_tower.ffns.0", "vision_tower.ffns.1"]


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({}, [*VISION, *TEXT]),
        ({"include": "vision_tower"}, VISION),
        ({"exclude": "vision_tower"}, TEXT),
        ({"include": "text.ffns.1"}, ["text.ffns.1"]),
        ({"include": "ffns.1"}, ["vision_tower.ffns.1", "text.ffns.1"]),
        ({"include": "text.ffns.1?"}, ["text.ffns.10", "text.ffns.11"]),
        ({"include": "text.*", "exclude": ["text.ffns.0.*", "text.ffns.11.*"]}, TEXT[1:-1]),
        ({"include": ("text.ffns.[23]", "vision_tower.ffns.0")}, ["vision_tower.ffns.0", "text.ffns.2", "text.ffns.3"]),
        ({"include": "wg"}, TEXT),
        ({"include": lambda spec: spec.gated, "exclude": "ffns.1*"}, ["text.ffns.0", *TEXT[2:10]]),
        ({"exclude": [lambda spec: spec.gated, "vision_tower.ffns.0"]}, ["vision_tower.ffns.1"]),
        ({"exclude": []}, [*VISION, *TEXT]),
        ({"exclude": lambda spec: False}, [*VISION, *TEXT]),
    ],
)
def test_what_a_choice_means(choice: dict[str, Any], found: list[str]) -> None:
    model = Both()
    assert names(model, **choice) == found
    whole = discover(model, **choice)
    assert sorted(spec.name for spec in (*whole.specs, *whole.excluded)) == sorted([*VISION, *TEXT])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"include": "vision"}, r"include='vision' means no FFN of this model: there are model.layers.0.mlp, model.l"),
        ({"exclude": ["layers.0", "layers.01"]}, r"exclude='layers.01' means no FFN of this model"),
        ({"include": ""}, "include='' means no FFN"),
        ({"exclude": "*"}, r"exclude='\*' leaves no FFN to make sparse: there are model.layers.0.mlp, model.layers.1"),
        ({"include": []}, r"include=\[\] leaves no FFN"),
        ({"include": "layers.0", "exclude": "layers.0"}, r"include='layers.0' and exclude='layers.0' leaves no FFN"),
        ({"include": lambda spec: False}, "leaves no FFN"),
    ],
)
def test_a_choice_of_nothing_is_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_ffns(tiny_llama(), **choice)


@pytest.mark.parametrize("which", [3, b"text", [None], {"text": True}, 0.5])
def test_what_is_no_choice(which: Any) -> None:
    for name in ("include", "exclude"):
        with pytest.raises(TypeError, match=f"{name}=.* is no name, pattern or function"):
            find_ffns(tiny_llama(), **{name: which})


def test_layers_that_are_split_go_by_the_names_of_their_parts() -> None:
    spec = FFNSpec("layers.0", "intermediate.dense", "output.dense", "gelu", 16, 64, split=True)
    for pattern in ("layers.0", "layers.0.*", "layers.0.intermediate", "output.dense", "*dense"):
        assert matches(pattern, spec), pattern
    for pattern in ("layers", "layers.*"):
        assert matches(pattern, spec)
    for pattern in ("layer", "ayers.0", "layers.0.attention", "0.output.intermediate"):
        assert not matches(pattern, spec), pattern


def test_a_pattern_for_what_is_refused() -> None:
    """Leaving out what cannot be made sparse is no mistake; asking for it is, and the reason is said."""
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    assert names(model, exclude="layers.0") == ["model.layers.1.mlp"]
    with pytest.raises(ValueError, match=r"means no FFN that can be made sparse: model.layers.0.mlp up_proj is a"):
        find_ffns(model, include="layers.0")


def test_many_names_are_told_in_short() -> None:
    assert listed(f"layers.{i}.mlp" for i in range(32)) == "layers.*.mlp (32)"
    assert listed(["a.0", "a.1"]) == "a.0, a.1"


parts = st.lists(st.sampled_from(["a", "b", "ab", "0", "10"]), min_size=1, max_size=4)


@given(st.lists(parts, min_size=1, max_size=6), st.lists(parts, max_size=2), st.lists(parts, max_size=2))
def test_a_choice_divides_and_keeps_order(owners: list, include: list, exclude: list) -> None:
    """Of plain names: an FFN is meant iff the name's parts follow each other somewhere in its own."""
    specs = [FFNSpec(".".join(owner), "up", "down", "relu", 4, 8) for owner in owners]

    def meant(name: list[str], spec: FFNSpec) -> bool:
        of = spec.name.split(".")
        return any(of[i : i + len(name)] == name for i in range(len(of)))

    for name in (*include, *exclude):
        pattern = ".".join(name)
        assert all(matches(pattern, spec) == meant(name, spec) for spec in specs)
        assert fnmatch.translate(pattern)
    wanted = [s for s in specs if not include or any(meant(n, s) for n in include)]
    wanted = [s for s in wanted if not any(meant(n, s) for n in exclude)]
    sound = all(any(meant(name, spec) for spec in specs) for name in (*include, *exclude))
    given_include = [".".join(name) for name in include] or None
    if not sound or not wanted:
        with pytest.raises(ValueError, match="FFN"):
            choose(specs, {}, given_include, [".".join(name) for name in exclude])
        return
    kept, left = choose(specs, {}, given_include, [".".join(name) for name in exclude])
    assert kept == wanted and left == [spec for spec in specs if spec not in wanted]
