"""Generation: a causal language model learns to describe restaurants (E2E), dense, then sparse; BLEU at several tau.

    python examples/generation.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data e2e

The data are two files of a folder, e2e_valid.jsonl, which is trained on, and e2e_test.jsonl (or .jsonl.gz): an object a
line with ``meaning_representation`` and ``human_reference``. Texts for the first meanings of the test file are written
greedily and scored against all their references. Without a GPU it stays small enough for a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparsify
from torch_prunepath.baselines import train_dense
from torch_prunepath.config import check_tau
from torch_prunepath.console import report
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.train import TrainConfig, recipes, train

CPU = {"steps": 20, "sparse_steps": 20, "batch": 8, "meanings": 16, "calibration_tokens": 2048}
CUDA = {"steps": 500, "sparse_steps": 500, "batch": 32, "meanings": 630, "calibration_tokens": 16384}


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are larger where there is a CUDA device."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--model", required=True, help="folder or name of a causal language model, or a GGUF file")
    add("--data", required=True, type=Path, metavar="DIR", help="folder with e2e_valid.jsonl and e2e_test.jsonl")
    add("--steps", type=int, help="of the dense model's fine-tuning")
    add("--sparse-steps", type=int, help="of the sparse model's training, which starts from the fine-tuned dense one")
    add("--batch", type=int, help="rows a step")
    add("--lr", type=float, default=2e-4, help="peak learning rate (default: 2e-4)")
    add("--meanings", type=int, help="of the test file that texts are written for")
    add("--new-tokens", type=int, default=64, help="tokens a text, at most (default: 64)")
    add("--calibration-tokens", type=int, help="of training data, that experts and routers are made from")
    add("--tau", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.6], help="thresholds to measure at")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")
    add("-o", "--output", type=Path, metavar="DIR", help="save the sparse model here")
    add("--json", action="store_true", help="print one JSON object")
    found.set_defaults(**(CUDA if torch.cuda.is_available() else CPU))
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, write and score; what was found."""
    started = time.perf_counter()
    if any(find_spec(name) is None for name in ("rouge_score", "sacrebleu")):
        raise UserError("scores need rouge_score and sacrebleu: pip install rouge-score sacrebleu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_user_error(ValueError):
        taus = [check_tau(tau) for tau in args.tau]
        experts = SparsifyConfig(calibration_tokens=args.calibration_tokens, seed=args.seed)
        same: dict[str, Any] = {"lr": args.lr, "autocast": device == "cuda", "seed": args.seed}
        dense = TrainConfig(steps=args.steps, **same)
        sparse = dataclasses.replace(recipes.ours(args.sparse_steps, low=0.2, high=0.7), **same)
    model, tokenizer = load_model(args.model)
    model = model.float().to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches, test = load_data(args, tokenizer)

    train_dense(model, batches, dense)
    texts = write(model, tokenizer, test, args)
    rows = [{"name": "dense", "tau": None, "sparsity": 0.0, **scores(texts, test), "text": texts[0]}]

    some = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(batches, 16)]
    with as_user_error(ValueError):
        sparsify(model, config=experts, calibration=some)
    train(model, batches, sparse)
    for tau in taus:
        set_tau(model, tau)
        with record_sparsity(model) as record:
            texts = write(model, tokenizer, test, args)
        found = {"name": f"tau {tau:g}", "tau": tau, "sparsity": record.sparsity, **scores(texts, test)}
        rows.append({**found, "text": texts[0]})
    if args.output is not None:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    seconds = round(time.perf_counter() - started, 1)
    return {**report.machine(), "settings": vars(args), "meaning": next(iter(test)), "rows": rows, "seconds": seconds}


def load_data(args: argparse.Namespace, tokenizer: Any) -> tuple[DataLoader, dict[str, list[str]]]:
    """Shuffled training batches, whose loss counts the references alone; the test's references by meaning."""
    files = {split: [str(path) for path in args.data.glob(f"e2e_{split}.jsonl*")] for split in ("valid", "test")}
    if not all(files.values()):
        raise UserError(f"no e2e_valid.jsonl and e2e_test.jsonl (or .gz) in {args.data}: name their folder with --data")
    splits = load_dataset("json", data_files=files)
    if not {"meaning_representation", "human_reference"} <= splits["valid"].features.keys():
        raise UserError(f"{files['valid'][0]} needs 'meaning_representation' and 'human_reference' in each line")

    def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
        given = tokenizer(prompt(row["meaning_representation"]))["input_ids"]
        answer = tokenizer(f" {row['human_reference']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        ids = given + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(given) + answer}

    rows = splits["valid"].map(tokenized, remove_columns=splits["valid"].column_names, desc="tokenising")
    collate, order = DataCollatorForSeq2Seq(tokenizer), torch.Generator().manual_seed(args.seed)
    references: dict[str, list[str]] = {}
    for row in splits["test"]:
        references.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    test = dict(islice(references.items(), args.meanings))
    if not test:
        raise UserError(
            f"nothing to write for: --meanings {args.meanings}, and {len(references)} in {files['test'][0]}"
        )
    return DataLoader(rows, args.batch, shuffle=True, generator=order, collate_fn=collate), test


def prompt(meaning: str) -> str:
    """What the model goes on from."""
    return f"{meaning}\n\nDescription:"


@torch.inference_mode()
def write(model: Any, tokenizer: Any, test: dict[str, list[str]], args: argparse.Namespace) -> list[str]:
    """A text for each meaning, greedily; rows are padded on the left, so that all go on from their last token."""
    model.eval()
    texts = []
    meanings = list(test)
    for start in tqdm(range(0, len(meanings), 4 * args.batch), desc="writing", leave=False, disable=None):
        prompts = [prompt(meaning) for meaning in meanings[start : start + 4 * args.batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=args.new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        written = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [text.strip() for text in written]
    return texts


def scores(texts: Sequence[str], test: dict[str, list[str]]) -> dict[str, float]:
    """BLEU of all texts, and their mean ROUGE-L, both in [0, 100], against all references."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    references = list(test.values())
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score_multi(some, text)["rougeL"].fmeasure for some, text in zip(references, texts, strict=True)]
    # First references, then second ones, and so on; None where there is none. Forced: the data are tokenised already.
    bleu = corpus_bleu(list(texts), list(zip_longest(*references)), force=True).score
    return {"bleu": bleu, "rouge_l": 100 * sum(rouge) / len(rouge)}


def render(results: dict[str, Any]) -> str:
    """The results as people read them."""
    rows = results["rows"]
    cells = [(r["name"], f"{r['sparsity']:.1%}", f"{r['bleu']:.1f}", f"{r['rouge_l']:.1f}") for r in rows]
    lines = [*report.aligned([("", "sparsity", "BLEU", "ROUGE-L"), *cells]), "", results["meaning"]]
    lines += [f"  {row['name']}: {row['text']}" for row in rows]
    return "\n".join([*lines, "", f"{results['settings']['meanings']} meanings, {results['seconds']:.0f} s"])


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
