"""What only a CUDA device can show: no host synchronisation, graph capture, peak memory, and the same numbers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_prunepath import SparsifyConfig, densify, record_sparsity, set_sparsity, set_tau, sparse_layers, sparsify
from torch_prunepath.bench.check import relative_rms
from torch_prunepath.bench.decoder import Decoder, logits_of
from torch_prunepath.compile.backend import DISABLE, prunepath
from torch_prunepath.train.losses import distill_logits

pytestmark = pytest.mark.gpu
CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")


def moved(name: str, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    model, inputs = ARCHITECTURES[name]()
    return model.eval().to("cuda", dtype), {k: v.cuda() for k, v in inputs.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "t5_gated"])
def test_same_as_on_cpu(name: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    sparsify(model.double().eval(), tau=0.5, config=CONFIG, progress=False)
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = copy.deepcopy(model).cuda()(**{k: v.cuda() for k, v in inputs.items()})[0]
    # Norms compute in float32 whatever the model's dtype.
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["one", "sigmoid"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_no_synchronisation_and_graph_capture(name: str, gate: str) -> None:
    model, _inputs = moved(name)
    sparsify(model, tau=0.5, config=SparsifyConfig(**{**vars(CONFIG), "gate": gate}), progress=False)
    layers = model.model.layers if name == "llama" else model.model.decoder.layers
    layer = layers[0].mlp if name == "llama" else nn.Sequential(layers[0].fc1, nn.ReLU(), layers[0].fc2)
    x = torch.randn(1, model.config.hidden_size, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        outputs = []
        for tau in (0.5, 0.9, 1.0):  # one graph serves them all
            set_tau(model, tau)
            graph.replay()
            torch.testing.assert_close(y, layer(x))
            outputs.append(y.clone())
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_autocast_leaves_the_router_in_float32(tokens: int) -> None:
    model, _inputs = moved("llama")
    sparsify(model, tau=0.5, config=CONFIG, progress=False)
    router = model.model.layers[0].mlp.router
    x = torch.randn(tokens, model.config.hidden_size, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = router(x)
    torch.testing.assert_close(found, router(x), rtol=0, atol=0)


def test_recording_synchronises_only_when_read() -> None:
    model, _inputs = moved("llama")
    sparsify(model, tau=0.5, config=CONFIG, progress=False)
    layer = model.model.layers[0].mlp
    x = torch.randn(4, model.config.hidden_size, device="cuda")
    with record_sparsity(model) as record, torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert record.tokens == 4


def test_default_recipe_on_the_device() -> None:
    model, inputs = moved("llama", torch.bfloat16)
    sparsify(model, tau=0.9, calibration=inputs, progress=False)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    set_sparsity(model, 0.5, inputs, tolerance=0.05, progress=False)
    assert model(**inputs).logits.isfinite().all()
    sparsify(densify(model), tau=0.9, config=SparsifyConfig(calibration_tokens=64), progress=False)


class FFN(nn.Module):
    """A gated FFN of 96 MiB in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(2048, 8192, bias=False), nn.Linear(2048, 8192, bias=False)
        self.down = nn.Linear(8192, 2048, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_distillation_of_logits_is_the_cpu_s(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(33, 5001, generator=generator).to(dtype) for _ in range(2))
    weight_T = torch.rand(33, generator=generator).double()
    found = {}
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        logits = student.to(device, kind, copy=True).requires_grad_()
        loss = distill_logits(logits, teacher.to(device, kind), weight_T.to(device), temperature=2.0)
        (3 * loss).backward()
        found[device] = loss.detach().cpu().double(), logits.grad.cpu().double()
    (loss, grad), (expected, expected_grad) = found["cuda"], found["cpu"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    scale = expected_grad.abs().max()
    torch.testing.assert_close(grad / scale, expected_grad / scale, rtol=0, atol=1e-2 if dtype.itemsize == 2 else 1e-5)


def test_peak_memory_is_the_model_and_one_layer() -> None:
    model = nn.Sequential(*[FFN() for _ in range(6)]).to("cuda", torch.bfloat16)
    config = SparsifyConfig(expert_size=64, partition="random", router="zero", budget="uniform")
    sparsify(copy.deepcopy(model[:1]), config=config, progress=False)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sparsify(model, config=config, progress=False)
    layer = sum(p.nbytes for p in FFN().bfloat16().parameters())
    added = sum(m.router.weight.nbytes + m.permutation.nbytes for m in sparse_layers(model).values())
    assert torch.cuda.max_memory_allocated() - before <= layer + added + 2**20
    assert torch.cuda.memory_allocated() - before <= added + 2**20


def test_a_compiled_decoding_step_gathers_projections_and_shares_heads() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=2, **shape)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    sparsify(model, tau=1.0, config=CONFIG, progress=False)
    work = Decoder(model, torch.randint(257, (1, 20), device="cuda"), new_tokens=4)
    expected = logits_of(work, work.step, 4)
    found = {}
    for disabled in ((), ("fuse_linears", "share_heads")):
        torch.compiler.reset()
        backend = functools.partial(prunepath, options={DISABLE: disabled})
        step = torch.compile(work._call(), backend=backend, fullgraph=True)
        assert relative_rms(logits_of(work, step, 4), expected) < 0.03
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work.turn(step, 1)
        found[disabled] = {event.key: event.count for event in profile.key_averages()}
        work.rewind()
    assert found[()]["prunepath::linears"] == 2 * config.num_hidden_layers + 1
    assert "prunepath::linears" not in found["fuse_linears", "share_heads"]
