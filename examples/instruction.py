"""Instruction tuning: a causal language model learns to answer (SFT), dense, then sparse; MMLU 5-shot at several tau.

    python examples/instruction.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data dolly_hhrlhf_1k.jsonl

The data are JSON lines, compressed or not, with ``prompt`` and ``response``; the last rows, 50 or a tenth, are kept to
measure the loss of answers. MMLU runs in lm-eval, which fetches it, unless --mmlu names a folder with
SUBJECT/dev/*.arrow and SUBJECT/test/*.arrow. Without a GPU all stays small: few steps, few questions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
import torch
from datasets import load_dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparsify
from torch_prunepath.baselines import train_dense
from torch_prunepath.config import check_tau
from torch_prunepath.console import report
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.integrations.lm_eval import PrunePathLM
from torch_prunepath.train import TrainConfig, recipes, train

CPU = {"steps": 16, "sparse_steps": 16, "batch": 4, "length": 256, "calibration_tokens": 2048, "limit": 10}
CUDA = {"steps": 300, "sparse_steps": 300, "batch": 16, "length": 512, "calibration_tokens": 16384, "limit": None}


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are larger where there is a CUDA device."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--model", required=True, help="folder or name of a causal language model, or a GGUF file")
    add("--data", required=True, type=Path, metavar="FILE", help="JSON lines with prompt and response")
    add("--mmlu", type=Path, metavar="DIR", help="folder of MMLU's subjects as arrow files (default: fetched)")
    add("--subjects", nargs="+", default=["anatomy", "astronomy"], metavar="NAME", help="of MMLU (default: two)")
    add("--limit", type=int, help="questions a subject")
    add("--steps", type=int, help="of the dense model's fine-tuning")
    add("--sparse-steps", type=int, help="of the sparse model's training, which starts from the fine-tuned dense one")
    add("--batch", type=int, help="rows a step")
    add("--lr", type=float, default=1e-4, help="peak learning rate (default: 1e-4)")
    add("--length", type=int, help="tokens a row, at most")
    add("--calibration-tokens", type=int, help="of training data, that experts and routers are made from")
    add("--tau", type=float, nargs="+", default=[1.0, 0.9, 0.8], help="thresholds to measure at")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("-o", "--output", type=Path, metavar="DIR", help="save the sparse model here")
    add("--json", action="store_true", help="print one JSON object")
    found.set_defaults(**(CUDA if torch.cuda.is_available() else CPU))
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure; what was found."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_user_error(ValueError):
        taus = [check_tau(tau) for tau in args.tau]
        experts = SparsifyConfig(calibration_tokens=args.calibration_tokens, seed=args.seed)
        same: dict[str, Any] = {"lr": args.lr, "autocast": device == "cuda", "seed": args.seed}
        dense = TrainConfig(steps=args.steps, **same)
        sparse = dataclasses.replace(recipes.ours(args.sparse_steps, low=0.2, high=0.6), **same)
    with mmlu_tasks(args) as asked:
        model, tokenizer = load_model(args.model)
        model = model.float().to(device)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        batches, kept = load_data(args, tokenizer)
        train_dense(model, batches, dense)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
        rows = [{"name": "dense", "tau": None, "sparsity": 0.0, "loss": answer_loss(model, kept), **mmlu(lm, asked)}]
        some = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(batches, 16)]
        with as_user_error(ValueError):
            sparsify(model, config=experts, calibration=some)
        train(model, batches, sparse)
        lm = PrunePathLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
        for tau in taus:
            set_tau(model, tau)
            with record_sparsity(model) as record:
                loss = answer_loss(model, kept)
            lm.reset_sparsity()
            found = {"loss": loss, "sparsity_of_answers": record.sparsity, **mmlu(lm, asked)}
            rows.append({"name": f"tau {tau:g}", "tau": tau, "sparsity": lm.sparsity_info()["sparsity"], **found})
    if args.output is not None:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    return {
        **report.machine(),
        "settings": vars(args),
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
    }


def load_data(args: argparse.Namespace, tokenizer: Any) -> tuple[DataLoader, DataLoader]:
    """Shuffled training batches, and batches of the kept rows; the loss counts the answers alone."""
    try:
        rows = load_dataset("json", data_files=str(args.data), split="train")
    except FileNotFoundError as error:
        raise UserError(f"no file {args.data}: name one with --data") from error
    if not {"prompt", "response"} <= rows.features.keys():
        raise UserError(f"{args.data} needs 'prompt' and 'response' in each line")

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        given = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["response"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids, labels = (given + answer)[: args.length], ([-100] * len(given) + answer)[: args.length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    rows = rows.map(tokenized, remove_columns=rows.column_names, desc="tokenising")
    rows = rows.filter(lambda row: row["labels"][-1] != -100, desc="leaving out prompts that are too long")
    kept = min(50, len(rows) // 10)
    if not kept:
        raise UserError(f"{args.data} holds {len(rows)} rows with an answer within --length: give more than 9")
    parts = rows.train_test_split(test_size=kept, shuffle=False)
    collate, order = DataCollatorForSeq2Seq(tokenizer), torch.Generator().manual_seed(args.seed)
    batches = DataLoader(parts["train"], args.batch, shuffle=True, generator=order, collate_fn=collate)
    return batches, DataLoader(parts["test"], args.batch, collate_fn=collate)


@torch.inference_mode()
def answer_loss(model: Any, batches: DataLoader) -> float:
    """Mean cross-entropy of the answers' tokens, in nats."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in tqdm(batches, desc="loss of answers", leave=False, disable=None):
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch.to(model.device), use_cache=False).loss) * count
        tokens += count
    return total / tokens


@contextlib.contextmanager
def mmlu_tasks(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What lm-eval is asked for: its own tasks, with data from files if --mmlu names them."""
    names = [f"mmlu_{subject}" for subject in args.subjects]
    own = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    with tempfile.TemporaryDirectory() as folder:
        for name, subject in zip(names, args.subjects, strict=True):
            if not (own / f"{name}.yaml").is_file():
                raise UserError(f"lm-eval knows no subject {subject!r} of MMLU: anatomy is one")
            if args.mmlu is not None:
                files = {part: list(map(str, args.mmlu.glob(f"{subject}/{part}/*.arrow"))) for part in ("dev", "test")}
                if not all(files.values()):
                    raise UserError(f"no {subject}/dev/*.arrow and {subject}/test/*.arrow in {args.mmlu}: see --mmlu")
                data = {"dataset_path": "arrow", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
                task = {"include": str(own / f"{name}.yaml"), "task": f"local_{name}", **data}
                (Path(folder) / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
        tasks = names if args.mmlu is None else [f"local_{name}" for name in names]
        manager = TaskManager(include_path=folder, include_defaults=args.mmlu is None)
        yield {"tasks": tasks, "task_manager": manager, "limit": args.limit}


def mmlu(lm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Accuracy over all questions, and its standard error."""
    found = lm_eval.simple_evaluate(model=lm, num_fewshot=5, bootstrap_iters=0, log_samples=False, **asked)
    counts = {task: found["n-samples"][task]["effective"] for task in asked["tasks"]}
    questions = sum(counts.values())
    share = sum(found["results"][task]["acc,none"] * count for task, count in counts.items()) / questions
    return {"mmlu": share, "standard_error": (share * (1 - share) / questions) ** 0.5, "questions": questions}


def render(results: dict[str, Any]) -> str:
    """The results as people read them."""
    rows = results["rows"]
    cells = [(r["name"], f"{r['sparsity']:.1%}", f"{r['loss']:.3f}", f"{r['mmlu']:.1%}") for r in rows]
    lines = report.aligned([("", "sparsity", "loss of answers", "MMLU"), *cells])
    error = f"standard error of MMLU {max(row['standard_error'] for row in rows):.1%}"
    return "\n".join([*lines, "", f"{rows[0]['questions']} questions, {error}, {results['seconds']:.0f} s"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; the exit code."""
    command = parser()
    args = command.parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
            results = run(args)
    except UserError as error:
        command.error(str(error))
    print(json.dumps(results, default=str) if args.json else render(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
