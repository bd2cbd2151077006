"""``torch.compile(backend="prunepath")`` on whole models: the same numbers, one graph, and what runs in it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, HAND_WRITTEN, token_ids
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from transformers import CompileConfig, StaticCache

from torch_prunepath import SparsifyConfig, register_routing_hook, set_sparsity, set_tau, set_thresholds, sparsify
from torch_prunepath.compile import backend
from torch_prunepath.compile.backend import DISABLE, Rewrite, prunepath
from torch_prunepath.ops.sparse_ffn import sparse_ffn


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    backend._say_once_that_nothing_is_sparse.cache_clear()
    yield
    torch._dynamo.reset()


def sparse(name: str, tau: float = 0.5, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = (ARCHITECTURES | HAND_WRITTEN)[name]()
    config = SparsifyConfig(expert_size=8, partition="contiguous", router="centroid", budget="uniform", **settings)
    sparsify(model.eval(), tau=tau, config=config, progress=False)
    return model, inputs


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="prunepath", **{"fullgraph": True, **options})


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def operators(call: Callable[[], Any]) -> Counter[str]:
    """Which of our operators run, and how often: true whatever caches the compiled code comes from.

    Those count too that the default implementation of ``sparse_ffn`` calls.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("prunepath::")}
    return Counter({name.removeprefix("prunepath::"): count for name, count in calls.items()})


# --- options ----------------------------------------------------------------------------------------------------------


def test_it_is_found_by_name() -> None:
    assert "prunepath" in torch._dynamo.list_backends(None)


def test_unknown_passes_are_refused_with_the_names_of_all() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(ValueError, match="'fuse_all'; the passes are fuse_relu, inline_dense, fuse_ffn"):
        prunepath(graph, [torch.ones(3)], options={DISABLE: ["fuse_ffn", "fuse_all"]})


@pytest.mark.parametrize("wrong", [{"mode": "fastest"}, {"options": {"no_such_option": 1}}], ids=["mode", "option"])
def test_what_inductor_does_not_know_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"fastest|no_such_option"):
        prunepath(torch.fx.symbolic_trace(lambda x: x + 1), [torch.ones(3)], **wrong)


class UserPass(CustomGraphPass):
    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append({str(node.target) for node in graph.nodes})

    def uuid(self) -> str:
        return "user"


def test_the_cache_key_covers_passes_and_purpose() -> None:
    user = UserPass()
    variants = [
        Rewrite(names, training, before)
        for names in [(), ("fuse_ffn",)]
        for training in (False, True)
        for before in (None, user)
    ]
    keys = [rewrite.uuid() for rewrite in variants]
    assert len(set(keys)) == len(keys) and None not in keys
    assert Rewrite(("fuse_ffn",), True, [user]).uuid() == Rewrite(("fuse_ffn",), True, user).uuid()
    assert Rewrite(("fuse_ffn",), True, lambda graph: None).uuid() is None, "no key: must not be cached"


@pytest.mark.parametrize("given", ["config", "options"])
def test_a_pass_that_the_user_gave_inductor_runs_too(given: str) -> None:
    model, inputs = sparse("functional_silu")
    model.train()  # whose layers call their parts one by one, also without gradients
    user = UserPass()
    hook: dict[str, Any] = {"post_grad_custom_pre_pass": user}
    configured, options = (hook, {}) if given == "config" else ({}, hook)
    with inductor_config.patch({"force_disable_caches": True, **configured}):
        call = compiled(model, options=options)
        with torch.no_grad():
            call(**inputs)
    assert operators(lambda: call(**inputs))["sparse_ffn"] == 2
    (targets,) = user.seen
    assert "prunepath.expert_down.default" in targets and "prunepath.sparse_ffn.default" not in targets


# --- whole models -----------------------------------------------------------------------------------------------------

FUSED = {  # name -> settings, and which operators must run in one forward pass
    "llama": ({"gate": "sigmoid"}, {"sparse_ffn": 2}),
    "phi3": ({"rule": "below"}, {"sparse_ffn": 2}),
    "opt": ({"gate": "sigmoid"}, {"sparse_ffn": 2}),
    "bert": ({}, {"router_scores": 2, "select_experts": 2, "expert_up": 2, "expert_down": 2}),
    "sequential": ({"gate": "sigmoid", "router_norm": True}, {"sparse_ffn": 2}),
}


@pytest.mark.parametrize("name", FUSED)
def test_one_graph_for_every_tau(name: str) -> None:
    settings, expected = FUSED[name]
    model, inputs = sparse(name, **settings)
    call = compiled(model)
    with torch.no_grad():
        for tau in (0.5, 0.8, 1.0):
            set_tau(model, tau)
            torch.testing.assert_close(first(call(**inputs)), first(model(**inputs)), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    ran = operators(lambda: call(**inputs))
    assert {name: ran[name] for name in expected} == expected


def test_shared_experts_and_a_normalised_router() -> None:
    dense, inputs = ARCHITECTURES["llama"]()
    config = SparsifyConfig(expert_size=8, gate="sigmoid", gate_offset=0.5, router_norm=True, shared_experts=2)
    model = sparsify(dense.eval(), tau=0.5, config=config, calibration=inputs, progress=False)
    call = compiled(model)
    model.train()  # whose layers call their parts one by one, for the passes to put together
    with torch.no_grad():
        torch.testing.assert_close(first(call(**inputs)), first(model(**inputs)), rtol=1e-4, atol=1e-5)
    assert operators(lambda: call(**inputs))["sparse_ffn"] == 2


@pytest.mark.parametrize("name", ["functional_silu", "t5"])
def test_bfloat16(name: str) -> None:
    """T5's last projection stays in float32 there: its halves have two dtypes and are not fused."""
    model, inputs = sparse(name, tau=1.0, gate="sigmoid")
    model.to(torch.bfloat16)
    if name == "t5":
        for module in model.modules():
            if hasattr(module, "wo"):
                module.wo.float()
        inputs["use_cache"] = False
    else:
        inputs["x"] = inputs["x"].bfloat16()
    call = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(first(call(**inputs)).float(), first(model(**inputs)).float(), rtol=5e-2, atol=5e-2)
    ran = operators(lambda: call(**inputs))
    assert (ran["sparse_ffn"] == 0) == (name == "t5") and ran["sparse_ffn"] + ran["expert_down"] > 0


@pytest.mark.parametrize(
    ("name", "cache"), [("llama", "own"), ("gpt2", "own"), ("opt", "own"), ("llama", "of transformers")]
)
def test_generate_with_a_static_cache(name: str, cache: str) -> None:
    """One graph, whatever the prompt's length, tau or sparsity; the tokens of eager greedy decoding."""
    model, _ = sparse(name)
    config = CompileConfig(backend="prunepath", mode="reduce-overhead", fullgraph=True)
    config._compile_all_devices = True
    greedy = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    batch = {"input_ids": token_ids(3)}

    def check(length: int) -> None:
        prompt = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(length))
        eager = model.generate(prompt, disable_compile=True, **greedy)
        static: dict[str, Any] = {"cache_implementation": "static"}
        if cache == "own":
            static = {"past_key_values": StaticCache(model.config, max_cache_len=32)}
        found = model.generate(prompt, compile_config=config, **static, **greedy)
        assert torch.equal(found, eager)

    # A cache that transformers allocates is replaced by a longer one when a prompt needs it: longest first.
    check(8 if cache == "own" else 12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(5)
        for tau in (0.2, 1.0):
            set_tau(model, tau)
            check(7)
        set_sparsity(model, 0.5, [batch], progress=False)
        check(12)
    assert counters["stats"]["unique_graphs"] == 1
    assert config == model._last_compile_config


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_modes(mode: str) -> None:
    model, inputs = sparse("functional_silu")
    call = compiled(model, mode=mode)
    with torch.no_grad():
        torch.testing.assert_close(call(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    assert operators(lambda: call(**inputs))["sparse_ffn"] == 2


def sequence(T: int) -> Tensor:
    """For the hand-written models."""
    return torch.randn(2, T, 16, generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize(("dynamic", "gate"), [(None, "sigmoid"), (True, "one"), (True, "sigmoid")])
def test_dynamic_shapes(dynamic: bool | None, gate: str) -> None:
    model, _ = sparse("functional_silu", gate=gate)
    call = compiled(model, dynamic=dynamic)
    start = sequence(5)
    if dynamic is None:
        torch._dynamo.mark_dynamic(start, 1)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x in (start, sequence(3), sequence(90)):
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
        assert operators(lambda: call(sequence(4))) == {"sparse_ffn": 2}


def test_many_tokens_leave_the_halves_to_inductor() -> None:
    model, _ = sparse("functional_silu", gate="sigmoid")
    model.train()
    x = sequence(40)
    call = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
    assert operators(lambda: call(x)) == {"router_scores": 2, "select_experts": 2}


@pytest.mark.parametrize("off", ["fuse_ffn", "fuse_relu"])
def test_a_pass_switched_off_by_name(off: str) -> None:
    model, inputs = sparse("opt")
    call = compiled(model, options={DISABLE: [off]})
    with torch.no_grad():
        torch.testing.assert_close(first(call(**inputs)), first(model(**inputs)), rtol=1e-4, atol=1e-5)
    ran = operators(lambda: call(**inputs))
    assert (ran["sparse_ffn"], ran["expert_up"], ran["expert_down"]) == (0, 2, 2)


# --- training, adapters, hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 7), (2, 40)], ids=["few-tokens", "many-tokens"])
def test_gradients(shape: tuple[int, int]) -> None:
    model, _ = sparse("llama", gate="sigmoid")
    model.train()
    ids = torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(0))

    def gradients(call: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad()
        call(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(model), gradients(compiled(model))
    assert any("router" in name for name in expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_gradients_with_dynamic_shapes() -> None:
    model, _ = sparse("functional_silu", gate="sigmoid")
    call = compiled(model.train(), dynamic=True)
    for T in (4, 9, 41):
        x = sequence(T)
        grads = []
        for forward in (model, call):
            model.zero_grad()
            forward(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_lora_on_the_projections() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = sparse("llama")
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    call = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(first(call(**inputs)), first(model(**inputs)), rtol=1e-4, atol=1e-5)
    ran = operators(lambda: call(**inputs))
    assert ran["sparse_ffn"] == 0 and ran["select_experts"] == 2


def test_a_routing_hook_still_decides() -> None:
    model, inputs = sparse("functional_silu", tau=0.1)
    call = compiled(model)
    with torch.no_grad():
        routed = call(**inputs)
        with register_routing_hook(model, lambda routing: torch.ones_like(routing.mask_TE)):
            full = call(**inputs)
        assert not torch.allclose(full, routed)
        torch.testing.assert_close(call(**inputs), routed)
        set_tau(model, 1.0)
        torch.testing.assert_close(full, model(**inputs), rtol=1e-4, atol=1e-5)


# --- nothing sparse, caches -------------------------------------------------------------------------------------------


def test_a_dense_model_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width in (3, 5):
            dense = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))
            x = torch.ones(2, 4)
            torch.testing.assert_close(compiled(dense)(x), dense(x))
    assert len([w for w in caught if "without sparse FFNs" in str(w.message)]) == 1


def test_resetting_dynamo_lets_go_of_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cudagraph_trees

    done: list[bool] = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: done.append(True))
    compiled(nn.Linear(3, 3), mode="reduce-overhead")(torch.ones(1, 3))
    torch._dynamo.reset()
    assert done


def test_a_sparse_model_says_nothing() -> None:
    model, inputs = sparse("functional_silu")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without sparse FFNs")
        for mode in (model.eval(), model.train()):
            compiled(mode)(**inputs).sum().backward()


CACHED = """
import sys, torch
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/tests/tools"]
from tests.compile.test_backend import compiled, operators, sparse
from torch._dynamo.utils import counters
model, inputs = sparse("functional_silu")
model.train()  # whose layers call their parts one by one
backend, off = sys.argv[2:]
options = {"prunepath.disable": [off]} if off else None
call = torch.compile(model, backend=backend, fullgraph=True, options=options)
with torch.no_grad():
    call(**inputs)
ran = operators(lambda: call(**inputs))
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print("RESULT", ran["sparse_ffn"], hits > 0)
"""


@pytest.mark.slow
def test_inductors_caches_tell_the_backends_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def process(name: str, off: str = "") -> str:
        command = [sys.executable, "-c", CACHED, str(Path(__file__).parents[2]), name, off]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return next(line for line in output.splitlines() if line.startswith("RESULT"))

    assert process("inductor") == "RESULT 0 False"
    assert process("prunepath") == "RESULT 2 False"
    assert process("prunepath", "fuse_ffn") == "RESULT 0 False"
    assert process("prunepath") == "RESULT 2 True"
    assert process("inductor") == "RESULT 0 True"


# --- the operator that takes the place of four ------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("plain", [False, True], ids=["gated", "plain"])
def test_schema_and_fake_of_the_whole_ffn(plain: bool, T: int) -> None:
    generator = torch.Generator().manual_seed(0)
    D, F, S = 16, 37, 8
    x, router, up, gate, down = (torch.randn(n, D, generator=generator) for n in (T, 5, F, F, F))
    bias_F, bias_D = torch.randn(F, generator=generator), torch.randn(D, generator=generator)
    routing = (router, None, torch.tensor(0.6), "reach", None if plain else 1.5)
    strided = down.t().contiguous().t()
    halves = (up, bias_F, None, None, down, bias_D) if plain else (up, None, gate, bias_F, strided, None)
    args = (x, *routing, *halves, "silu", S)
    torch.library.opcheck(sparse_ffn, args, test_utils=("test_schema", "test_faketensor"))


# --- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
@pytest.mark.parametrize("rows", [1, 3], ids=["few-tokens", "many-tokens"])
@torch.no_grad()
def test_thresholds_in_one_graph(name: str, rows: int) -> None:
    """Few tokens by fused operators, more by what Inductor fuses; one compilation for all values, 0 included."""
    model, inputs = sparse(name)
    inputs = {key: torch.cat([value] * rows) for key, value in inputs.items()}
    call = compiled(model)
    set_thresholds(model, inputs=0.0, neurons=0.0)
    before = first(model(**inputs))
    found = first(call(**inputs))
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)
    frames = counters["stats"]["unique_graphs"]
    for theta_x, theta_h in ((0.4137, 0.1193), (0.0, 0.0), (0.2931, 0.3171)):
        set_thresholds(model, inputs=theta_x, neurons=theta_h)
        expected = first(model(**inputs))
        torch.testing.assert_close(first(call(**inputs)), expected, rtol=1e-4, atol=1e-4)
        assert (theta_x > 0) != torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == frames == 1
    counted = operators(lambda: call(**inputs))
    fused = "sparse_ffn" in counted
    assert fused == (name == "llama" or (name == "opt" and rows == 1)), "whole FFNs are one operator in eager mode, too"


def test_gradients_through_thresholds_in_a_compiled_model() -> None:
    model, inputs = sparse("llama")
    set_thresholds(model, inputs=0.4137, neurons=0.1193)
    model.train()

    def gradients(call: Callable[..., Any]) -> list[Tensor]:
        model.zero_grad()
        call(**inputs, labels=inputs["input_ids"]).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients(model)
    torch.testing.assert_close(gradients(compiled(model)), expected, rtol=1e-4, atol=1e-5)
