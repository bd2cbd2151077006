"""Get a small model, and make lm-eval tasks from text that nothing is fitted to: prepare.py FOLDER QUESTIONS.

Writes ``FOLDER/base``, SmolLM2-135M-Instruct as an ordinary model, and ``FOLDER/tasks``. The text is Python's help
topics; routers are fitted to the first three quarters of it, and the tasks are made from the last quarter:

- ``help_text``: perplexity of passages;
- ``help_next``: which of four sentences comes next? The others are from elsewhere in the same quarter.
"""

import json
import random
import re
import sys
from pathlib import Path

from torch_prunepath.evaluation.corpus import help_topics
from torch_prunepath.evaluation.models import SMOLLM2, cache_folder, fetch, load_gguf

PASSAGE = 1500
"""Characters of a passage, about."""
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS = {
    "help_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "page",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "help_next": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
}


def passages(paragraphs: list[str]) -> list[dict[str, str]]:
    """Paragraphs joined until a passage is long enough."""
    found, page = [], ""
    for paragraph in paragraphs:
        page = f"{page}\n\n{paragraph}".strip()
        if len(page) >= PASSAGE:
            found.append({"page": page})
            page = ""
    return found


def questions(paragraphs: list[str], draw: random.Random) -> list[dict[str, object]]:
    """A question for each paragraph of prose that has a sentence to ask for."""
    prose = [" ".join(paragraph.split()) for paragraph in paragraphs]
    sentences = [re.split(r"(?<=[.])\s+(?=[A-Z])", text) for text in prose if re.match(r"[A-Z].{120,600}[.]$", text)]
    found: list[dict[str, object]] = []
    for first, *rest in [parts for parts in sentences if len(parts) > 1]:
        others = [parts[-1] for parts in sentences if parts[0] != first]
        answer = draw.randrange(4)
        choices = draw.sample(others, 3)
        choices.insert(answer, rest[0])
        found.append({"before": first, "choices": choices, "answer": answer})
    return found


def write_task(folder: Path, name: str, rows: list[dict]) -> None:
    """The rows, and what lm-eval is to do with them (JSON is YAML)."""
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **TASKS[name]}, indent=2))
    print(f"{name}: {len(rows)} documents")


def main(folder: Path, count: int) -> None:
    """Write everything: at most this many questions, and a quarter as many passages, which take longer."""
    model, tokenizer = load_gguf(fetch(SMOLLM2, cache_folder()))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    print(f"{SMOLLM2.name}: {folder / 'base'}")
    draw = random.Random(0)
    paragraphs = help_topics().held_out.split("\n\n")
    (folder / "tasks").mkdir(exist_ok=True)
    made = (("help_text", passages(paragraphs), count // 4), ("help_next", questions(paragraphs, draw), count))
    for name, rows, most in made:
        write_task(folder / "tasks", name, draw.sample(rows, min(most, len(rows))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
