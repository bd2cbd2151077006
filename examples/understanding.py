"""Understanding: fine-tune an encoder on sentences with labels, make it sparse, train on, compare at several tau.

    python examples/understanding.py MODEL DATA TASK [OUTPUT]

DATA is a folder with TASK_train.jsonl and TASK_dev.jsonl (or .jsonl.gz), as GLUE has them: an object a line, with an
integer ``label`` and one or two texts under any names. The sparse model is saved in OUTPUT.
"""

import dataclasses
import sys
from itertools import islice
from pathlib import Path

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparsify
from torch_prunepath.baselines import train_dense
from torch_prunepath.train import TrainConfig, recipes, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(name, data, task, output=None, *, steps=150, batch=32, lr=1e-4, calibration=4096, taus=(1, 0.9, 0.8, 0.6)):
    """Train dense, train sparse, and print how well each does."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    batches, dev, labels = load_data(tokenizer, Path(data), task, batch)
    torch.manual_seed(0)  # of the classification head
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels, dtype=torch.float32).to(DEVICE)

    train_dense(model, batches, TrainConfig(steps=steps, lr=lr))
    rows = [("dense", 0.0, accuracy(model, dev))]

    some = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(batches, 16)]
    sparsify(model, config=SparsifyConfig(calibration_tokens=calibration), calibration=some)
    train(model, batches, dataclasses.replace(recipes.ours(steps, low=0.2, high=0.7), lr=lr))  # for many sparsities
    for tau in taus:
        set_tau(model, tau)
        with record_sparsity(model) as record:
            score = accuracy(model, dev)
        rows.append((f"tau {tau:g}", record.sparsity, score))
    if output is not None:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)

    print("         sparsity  accuracy")
    for row in rows:
        print("{:7}  {:8.1%}  {:8.1%}".format(*row))
    return rows


def load_data(tokenizer, folder, task, batch):
    """Shuffled training batches, batches of the dev set, and how many labels there are."""
    files = {split: str(next(folder.glob(f"{task}_{split}.jsonl*"))) for split in ("train", "dev")}
    splits = load_dataset("json", data_files=files)
    texts = [name for name, kind in splits["train"].features.items() if kind.dtype in ("string", "large_string")]

    def tokenized(row):
        found = tokenizer(*(row[name] for name in texts), truncation=True, max_length=128)
        return {**found, "labels": row["label"]}

    splits = splits.map(tokenized, remove_columns=splits["train"].column_names)
    collate, order = DataCollatorWithPadding(tokenizer), torch.Generator().manual_seed(0)
    batches = DataLoader(splits["train"], batch, shuffle=True, generator=order, collate_fn=collate)
    return batches, DataLoader(splits["dev"], 128, collate_fn=collate), 1 + max(splits["train"]["labels"])


@torch.inference_mode()
def accuracy(model, batches):
    """Share of rows whose label the model finds."""
    model.eval()
    found = [model(**batch.to(DEVICE)).logits.argmax(-1) == batch["labels"].to(DEVICE) for batch in batches]
    return torch.cat(found).float().mean().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
