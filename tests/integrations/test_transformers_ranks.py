"""Tensor parallelism: a sparse model is refused in words, where a dense one is shared out over ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama
from torch import nn

from torch_prunepath import SparsifyConfig, sparsify

CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")

SCRIPT = """
import sys, torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
import torch_prunepath

dist.init_process_group("gloo")
dense, sparse = sys.argv[1:]
ids = torch.arange(3, 12)[None]
whole = AutoModelForCausalLM.from_pretrained(dense)
shared = AutoModelForCausalLM.from_pretrained(dense, tp_plan="auto")
with torch.no_grad():
    torch.testing.assert_close(shared(ids).logits, whole(ids).logits)
try:
    AutoModelForCausalLM.from_pretrained(sparse, tp_plan="auto")
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


def test_from_pretrained_with_a_plan_for_ranks(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=2)
    model.save_pretrained(tmp_path / "dense")
    sparsify(model, 0.5, config=CONFIG, progress=False).save_pretrained(tmp_path / "sparse")
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run([*launch, str(tmp_path / "dense"), str(tmp_path / "sparse")], capture_output=True, text=True)
    assert run.returncode != 0
    # torchrun ends the second rank as soon as the first one has failed.
    assert "refused: model.layers.0.mlp is sparse, and its weights are shared out over ranks" in run.stderr, run.stderr


@pytest.fixture
def mesh():  # type: ignore[no-untyped-def]
    """A device mesh of this process alone."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    destroy_process_group()


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_weights_shared_out_after_loading(mesh, part: str) -> None:  # type: ignore[no-untyped-def]
    from torch.distributed.tensor import distribute_tensor

    model = sparsify(tiny_llama(), 0.5, config=CONFIG, progress=False)
    linear = model.model.layers[0].mlp.get_submodule(part)
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
    for train in (True, False):
        model.train(train)
        with pytest.raises(ValueError, match=r"shared out over ranks \(DTensor\)"):
            model(torch.arange(3, 12)[None])


@pytest.mark.parametrize("name", ["llama", "bert", "opt", "gpt2"])
def test_weights_that_compute_in_their_own_way(name: str) -> None:
    """As torchao's quantised tensors: the layer calls its projections, and the mask is applied to what they return."""
    from architectures import ARCHITECTURES
    from torch.testing._internal.two_tensor import TwoTensor

    from torch_prunepath.layer.views import sparse_views

    model, inputs = ARCHITECTURES[name]()
    sparsify(model, 0.4, config=CONFIG, progress=False)
    with torch.no_grad():
        expected = model(**inputs)[0]
        for view in sparse_views(model).values():
            for module in filter(None, (view.up, view.gate, view.down)):
                weight = module.weight.detach()
                module.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
        found = model(**inputs)[0]
    assert isinstance(found, TwoTensor)
    torch.testing.assert_close(found.a, expected)
    torch.testing.assert_close(found.b, expected)
