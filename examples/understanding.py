"""Understanding: fine-tune an encoder on sentences with labels, make it sparse, train on, compare at several tau.

    python examples/understanding.py --model all-MiniLM-L6-v2 --data glue --task sst2

The data are GLUE's or look like it: TASK_train.jsonl and TASK_dev.jsonl (or .jsonl.gz) in one folder, an object a line
with an integer ``label`` and one or two texts under any names. Without a GPU it stays small enough for a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparsify
from torch_prunepath.baselines import train_dense
from torch_prunepath.config import check_tau
from torch_prunepath.console import report
from torch_prunepath.console.errors import UserError, as_user_error, one_line
from torch_prunepath.train import TrainConfig, recipes, train

CPU = {"steps": 150, "sparse_steps": 150, "batch": 32, "calibration_tokens": 4096}
CUDA = {"steps": 2000, "sparse_steps": 2000, "batch": 32, "calibration_tokens": 16384}


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are larger where there is a CUDA device."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--model", required=True, help="folder or name of an encoder (BERT and its like)")
    add("--data", required=True, type=Path, metavar="DIR", help="folder with TASK_train.jsonl and TASK_dev.jsonl")
    add("--task", default="sst2", help="what the files are called (default: sst2)")
    add("--steps", type=int, help="of the dense model's fine-tuning")
    add("--sparse-steps", type=int, help="of the sparse model's training, which starts from the fine-tuned dense one")
    add("--batch", type=int, help="rows a step")
    add("--lr", type=float, default=1e-4, help="peak learning rate (default: 1e-4)")
    add("--length", type=int, default=128, help="tokens a row, at most (default: 128)")
    add("--calibration-tokens", type=int, help="of training data, that experts and routers are made from")
    add("--tau", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.6], help="thresholds to measure at")
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
        sparse = dataclasses.replace(recipes.ours(args.sparse_steps, low=0.2, high=0.7), **same)
    tokenizer, batches, dev, labels = load_data(args)
    torch.manual_seed(args.seed)  # of the classification head
    with as_user_error(OSError, ValueError):
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels, dtype=torch.float32)
    model.to(device)

    train_dense(model, batches, dense)
    rows = [{"name": "dense", "tau": None, "sparsity": 0.0, "accuracy": accuracy(model, dev)}]

    some = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(batches, 16)]
    with as_user_error(ValueError):
        sparsify(model, config=experts, calibration=some)
    train(model, batches, sparse)
    for tau in taus:
        set_tau(model, tau)
        with record_sparsity(model) as record:
            score = accuracy(model, dev)
        rows.append({"name": f"tau {tau:g}", "tau": tau, "sparsity": record.sparsity, "accuracy": score})
    if args.output is not None:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    seconds = round(time.perf_counter() - started, 1)
    return {**report.machine(), "settings": vars(args), "dev_rows": len(dev.dataset), "rows": rows, "seconds": seconds}


def load_data(args: argparse.Namespace) -> tuple[Any, DataLoader, DataLoader, int]:
    """The tokenizer, shuffled training batches, batches of the dev set, and how many labels there are."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the model {args.model!r} ({one_line(error)}): give an encoder's folder"
        ) from error
    files = {split: [str(path) for path in args.data.glob(f"{args.task}_{split}.jsonl*")] for split in ("train", "dev")}
    if not all(files.values()):
        names = f"{args.task}_train.jsonl and {args.task}_dev.jsonl (or .gz)"
        raise UserError(f"no {names} in {args.data}: name their folder with --data")
    splits = load_dataset("json", data_files=files)
    texts = [name for name, kind in splits["train"].features.items() if kind.dtype in ("string", "large_string")]
    label = splits["train"].features.get("label")
    if label is None or not label.dtype.startswith("int") or not 1 <= len(texts) <= 2:
        raise UserError(f"{files['train'][0]} needs an integer 'label' and one or two texts a line")

    def tokenized(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer(*(row[name] for name in texts), truncation=True, max_length=args.length)
        return {**found, "labels": row["label"]}

    splits = splits.map(tokenized, remove_columns=splits["train"].column_names, desc="tokenising")
    collate, order = DataCollatorWithPadding(tokenizer), torch.Generator().manual_seed(args.seed)
    batches = DataLoader(splits["train"], args.batch, shuffle=True, generator=order, collate_fn=collate)
    dev = DataLoader(splits["dev"], 128, collate_fn=collate)
    return tokenizer, batches, dev, 1 + max(splits["train"]["labels"])


@torch.inference_mode()
def accuracy(model: Any, batches: DataLoader) -> float:
    """Share of rows whose label the model finds."""
    model.eval()
    right = 0
    for batch in tqdm(batches, desc="evaluating", leave=False, disable=None):
        found = model(**batch.to(model.device)).logits.argmax(-1)
        right += int((found == batch["labels"]).sum())
    return right / len(batches.dataset)


def render(results: dict[str, Any]) -> str:
    """The results as people read them."""
    cells = [(row["name"], f"{row['sparsity']:.1%}", f"{row['accuracy']:.1%}") for row in results["rows"]]
    lines = report.aligned([("", "sparsity", "accuracy"), *cells])
    return "\n".join([*lines, "", f"{results['dev_rows']} dev rows, {results['seconds']:.0f} s"])


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
