"""What lm-eval found, a row for each run: table.py FOLDER, in which each run has a folder."""

import json
import sys
from pathlib import Path

print(f"{'':14}  sparsity  perplexity of a word  of a byte  right answers")
for run in sorted(Path(sys.argv[1]).iterdir()):
    results = json.loads(max(run.rglob("results_*.json")).read_text())  # the newest: names end with the time
    text, choice = results["results"]["help_text"], results["results"]["help_next"]
    sparsity = results["config"].get("prunepath", {}).get("sparsity", 0.0)  # another model's results have no entry
    print(
        f"{run.name:14}  {sparsity:8.1%}  {text['word_perplexity,none']:20.2f}  {text['byte_perplexity,none']:9.4f}"
        f"  {choice['acc,none']:13.1%}"
    )
