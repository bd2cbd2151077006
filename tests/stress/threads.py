"""Requests from many threads to several sparse models at once: each answer is that of one thread alone.

    python -m tests.stress.threads --requests 100000 --threads 8 --json out.json

Half of the requests go through a pool of threads, as in a server's ``def`` endpoints, half through
``asyncio.to_thread``. The models: BERT, OPT, Whisper, Bloom and Llama, and BERT with a PrunePath adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from architectures import ARCHITECTURES

from torch_prunepath import SparsifyConfig, sparsify

NAMES = ("bert", "opt", "whisper", "bloom", "llama", "bert adapter")
ALL_SPLIT = ("bert", "roberta", "opt", "bloom", "mpt", "whisper", "bart", "llama")
CONFIG = {"expert_size": 8, "partition": "random", "router": "zero", "budget": "uniform"}
REQUESTS = 8
"""Different requests to each model."""
TOLERANCE = 1e-5
"""Largest difference from the answer of one thread: the same products may be summed in another order."""


@dataclass(frozen=True)
class Server:
    """A model, requests to it, and what it answers when nothing else runs."""

    name: str
    model: nn.Module
    requests: list[dict[str, Any]]
    answers: list[Tensor]

    def check(self, i: int) -> str:
        """Answer request ``i``: ``"right"``, ``"wrong answer"``, or the error."""
        try:
            found = answer(self.model, self.requests[i % REQUESTS])
        except Exception as error:  # to be counted
            return f"{type(error).__name__}: {error}"[:200]
        expected = self.answers[i % REQUESTS]
        return "right" if torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE) else "wrong answer"


def answer(model: nn.Module, request: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**request)
    return output if isinstance(output, Tensor) else output[0]


def server(name: str) -> Server:
    """A sparse model of an architecture, or an adapter on a dense one, with routers that choose by token."""
    base, _, adapter = name.partition(" ")
    model, inputs = _bart() if base == "bart" else ARCHITECTURES[base]()
    if adapter:
        from peft import get_peft_model

        from torch_prunepath.integrations.peft import PrunePathConfig

        model = get_peft_model(model, PrunePathConfig(tau=0.5, task_type=None, **CONFIG))
    else:
        sparsify(model, tau=0.5, config=SparsifyConfig(**CONFIG), progress=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            router = getattr(module, "router", None)
            if isinstance(router, nn.Linear):
                router.weight.normal_(std=3 * router.weight.shape[1] ** -0.5)
    model.eval()
    asked = [{key: _shuffled(value) for key, value in inputs.items()} for _ in range(REQUESTS)]
    answers = [answer(model, request) for request in asked]
    assert not torch.equal(answers[0], answers[1]), "requests that are answered alike test nothing"
    return Server(name, model, asked, answers)


def _bart() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 37))}  # fmt: skip
    config = transformers.BartConfig(vocab_size=96, d_model=32, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    ids = torch.randint(4, 90, (2, 7))
    return model, {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def _shuffled(value: Any) -> Any:
    return value.flatten()[torch.randperm(value.numel())].view_as(value) if isinstance(value, Tensor) else value


def run(servers: Sequence[Server], requests: int, threads: int) -> Counter[str]:
    """Ask ``requests`` times, from ``threads`` threads, the servers in turn; count outcomes by server."""

    def one(i: int) -> str:
        each = servers[i % len(servers)]
        return f"{each.name}: {each.check(i // len(servers))}"

    with ThreadPoolExecutor(threads) as pool:
        found = Counter(pool.map(one, range(requests // 2)))
    found.update(asyncio.run(_ask(one, range(requests // 2, requests), threads)))
    return found


async def _ask(one: Any, numbers: Iterable[int], threads: int) -> Counter[str]:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
    found: Counter[str] = Counter()
    numbers = list(numbers)
    for start in range(0, len(numbers), 1000):  # so many coroutines at a time
        found.update(await asyncio.gather(*(asyncio.to_thread(one, i) for i in numbers[start : start + 1000])))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print counts, and return 1 if any answer was not right."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.threads", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--requests", type=int, default=100_000, help="of all models together (100000)")
    parser.add_argument("--threads", type=int, default=8, help="threads that ask (8)")
    parser.add_argument("--models", default=",".join(NAMES), help="names, with commas between")
    parser.add_argument("--json", type=Path, help="a file for the counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    servers = [server(name) for name in options.models.split(",")]
    start = time.perf_counter()
    found = run(servers, options.requests, options.threads)
    seconds = time.perf_counter() - start
    for outcome, count in sorted(found.items()):
        print(f"{count:8} {outcome}")
    print(f"{sum(found.values())} requests from {options.threads} threads in {seconds:.0f} s")
    if options.json is not None:
        record = {
            "counts": dict(sorted(found.items())),
            "threads": options.threads,
            "seconds": round(seconds),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.platform(),
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(any(not outcome.endswith(": right") for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
