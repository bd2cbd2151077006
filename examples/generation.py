"""Generation: a causal language model learns to describe restaurants (E2E), dense, then sparse; BLEU at several tau.

    python examples/generation.py MODEL DATA

MODEL is a folder, a name or a GGUF file. DATA is a folder with e2e_valid.jsonl, which is trained on, and e2e_test.jsonl
(or .jsonl.gz): an object a line, with ``meaning_representation`` and ``human_reference``. Texts for the first meanings
of the test file are written greedily and scored against all their references.
"""

import dataclasses
import sys
from itertools import islice, zip_longest
from pathlib import Path

import torch
from datasets import load_dataset
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from torch_prunepath import SparsifyConfig, record_sparsity, set_tau, sparsify
from torch_prunepath.baselines import train_dense
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.train import TrainConfig, recipes, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "{}\n\nDescription:"


def main(name, data, *, steps=20, batch=8, lr=2e-4, meanings=16, calibration=2048, taus=(1, 0.9, 0.8, 0.6), longest=64):
    """Train dense, train sparse, and print what each writes."""
    model, tokenizer = load_model(name)
    model.float().to(DEVICE)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches, test = load_data(tokenizer, Path(data), batch, meanings)

    train_dense(model, batches, TrainConfig(steps=steps, lr=lr))
    texts = write(model, tokenizer, test, longest)
    rows = [("dense", 0.0, *scores(texts, test), texts[0])]

    some = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(batches, 16)]
    sparsify(model, config=SparsifyConfig(calibration_tokens=calibration), calibration=some)
    train(model, batches, dataclasses.replace(recipes.ours(steps, low=0.2, high=0.7), lr=lr))  # for many sparsities
    for tau in taus:
        set_tau(model, tau)
        with record_sparsity(model) as record:
            texts = write(model, tokenizer, test, longest)
        rows.append((f"tau {tau:g}", record.sparsity, *scores(texts, test), texts[0]))

    print("         sparsity  BLEU  ROUGE-L")
    for row in rows:
        print("{:7}  {:8.1%}  {:4.1f}  {:7.1f}".format(*row[:4]))
    print("", next(iter(test)), *(f"  {row[0]}: {row[4]}" for row in rows), sep="\n")
    return rows


def load_data(tokenizer, folder, batch, meanings):
    """Shuffled training batches, whose loss counts the references alone; the test's references by meaning."""
    files = {split: str(next(folder.glob(f"e2e_{split}.jsonl*"))) for split in ("valid", "test")}
    splits = load_dataset("json", data_files=files)

    def tokenized(row):
        given = tokenizer(PROMPT.format(row["meaning_representation"]))["input_ids"]
        answer = tokenizer(f" {row['human_reference']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        ids = given + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(given) + answer}

    rows = splits["valid"].map(tokenized, remove_columns=splits["valid"].column_names)
    collate, order = DataCollatorForSeq2Seq(tokenizer), torch.Generator().manual_seed(0)
    references = {}
    for row in splits["test"]:
        references.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    batches = DataLoader(rows, batch, shuffle=True, generator=order, collate_fn=collate)
    return batches, dict(islice(references.items(), meanings))


@torch.inference_mode()
def write(model, tokenizer, test, longest):
    """A text for each meaning; rows are padded on the left, so that all go on from their last token."""
    model.eval()
    prompts = [PROMPT.format(meaning) for meaning in test]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(DEVICE)
    inputs.pop("token_type_ids", None)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False, **ends)
    written = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in written]


def scores(texts, test):
    """BLEU of all texts, and their mean ROUGE-L, both in [0, 100], against all references."""
    scorer, references = RougeScorer(["rougeL"]), list(test.values())
    rouge = [scorer.score_multi(some, text)["rougeL"].fmeasure for some, text in zip(references, texts, strict=True)]
    # First references, then second ones, and so on; None where there is none. Forced: the data are tokenised already.
    return corpus_bleu(texts, list(zip_longest(*references)), force=True).score, 100 * sum(rouge) / len(rouge)


if __name__ == "__main__":
    main(*sys.argv[1:])
