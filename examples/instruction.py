"""Instruction tuning: a causal language model learns to answer (SFT), dense, then sparse; MMLU 5-shot at several tau.

    python examples/instruction.py MODEL DATA [MMLU]

MODEL is a folder, a name or a GGUF file. DATA holds JSON lines, compressed or not, with ``prompt`` and
``response``; the last 50 rows, or the last tenth, are kept to measure the loss of answers. MMLU runs in lm-eval, which
fetches it, unless MMLU is a folder with SUBJECT/dev/*.arrow and SUBJECT/test/*.arrow.
"""

import dataclasses
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path

import lm_eval
import torch
from datasets import load_dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from torch_prunepath import SparsifyConfig, set_tau, sparsify
from torch_prunepath.baselines import train_dense
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.integrations.lm_eval import PrunePathLM
from torch_prunepath.train import TrainConfig, recipes, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUBJECTS = ("anatomy", "astronomy")


def main(
    name, data, mmlu=None, *, steps=16, batch=4, lr=1e-4, longest=256, limit=10, calibration=2048, taus=(1, 0.9, 0.8)
):
    """Train dense, train sparse, and print how well each answers."""
    model, tokenizer = load_model(name)
    model.float().to(DEVICE)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches, kept = load_data(tokenizer, data, batch, longest)

    train_dense(model, batches, TrainConfig(steps=steps, lr=lr))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    rows = [("dense", 0.0, answer_loss(model, kept), *accuracy(lm, mmlu, limit))]

    some = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(batches, 16)]
    sparsify(model, config=SparsifyConfig(calibration_tokens=calibration), calibration=some)
    train(model, batches, dataclasses.replace(recipes.ours(steps, low=0.2, high=0.6), lr=lr))  # for many sparsities
    lm = PrunePathLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    for tau in taus:
        set_tau(model, tau)
        loss = answer_loss(model, kept)
        lm.reset_sparsity()
        right = accuracy(lm, mmlu, limit)
        rows.append((f"tau {tau:g}", lm.sparsity_info()["sparsity"], loss, *right))

    print("         sparsity  loss of answers   MMLU")
    for row in rows:
        print("{:7}  {:8.1%}  {:15.3f}  {:5.1%}".format(*row[:4]))
    print(f"\n{rows[0][4]} questions")
    return rows


def load_data(tokenizer, path, batch, longest):
    """Shuffled training batches, and batches of the kept rows; the loss counts the answers alone."""
    rows = load_dataset("json", data_files=str(path), split="train")

    def tokenized(row):
        given = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["response"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids, labels = (given + answer)[:longest], ([-100] * len(given) + answer)[:longest]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    rows = rows.map(tokenized, remove_columns=rows.column_names).filter(lambda row: row["labels"][-1] != -100)
    parts = rows.train_test_split(test_size=min(50, len(rows) // 10), shuffle=False)
    collate, order = DataCollatorForSeq2Seq(tokenizer), torch.Generator().manual_seed(0)
    batches = DataLoader(parts["train"], batch, shuffle=True, generator=order, collate_fn=collate)
    return batches, DataLoader(parts["test"], batch, collate_fn=collate)


@torch.inference_mode()
def answer_loss(model, batches):
    """Mean cross-entropy of the answers' tokens, in nats."""
    model.eval()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [float(model(**batch.to(DEVICE), use_cache=False).loss) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def accuracy(lm, folder, limit):
    """Share of right answers, and how many questions there were."""
    tasks = [f"mmlu_{subject}" for subject in SUBJECTS]
    with tempfile.TemporaryDirectory() as made:
        if folder is not None:
            tasks = [
                local_task(made, task, Path(folder), subject) for task, subject in zip(tasks, SUBJECTS, strict=True)
            ]
        manager = TaskManager(include_path=made, include_defaults=folder is None)
        asked = {"num_fewshot": 5, "limit": limit, "bootstrap_iters": 0, "log_samples": False}
        found = lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, **asked)
    counts = {task: found["n-samples"][task]["effective"] for task in tasks}
    right = sum(found["results"][task]["acc,none"] * count for task, count in counts.items())
    return right / sum(counts.values()), sum(counts.values())


def local_task(made, task, folder, subject):
    """The name of a copy of lm-eval's task that reads its questions from files."""
    own = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / f"{task}.yaml"
    files = {part: list(map(str, folder.glob(f"{subject}/{part}/*.arrow"))) for part in ("dev", "test")}
    data = {"dataset_path": "arrow", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    (Path(made) / f"{task}.yaml").write_text(json.dumps({"include": str(own), "task": f"local_{task}", **data}))
    return f"local_{task}"


if __name__ == "__main__":
    main(*sys.argv[1:])
