"""Train an adapter, routers alone, on Python's help topics: train.py BASE SPARSE OUTPUT STEPS.

The adapter is made with the settings that the sparse checkpoint SPARSE was made with.
"""

import sys
import time

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_prunepath import set_tau
from torch_prunepath.checkpoint import read_info
from torch_prunepath.evaluation.corpus import help_topics, windows
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.train import TrainConfig, draw, train

base, sparse, output, steps = *sys.argv[1:4], int(sys.argv[4])
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
rows = windows(help_topics().calibration, tokenizer, context=512, count=200, part="text to train on")

settings = read_info(sparse)["config"]
config = PrunePathConfig(task_type="CAUSAL_LM", tau=0.9, calibration=rows, router_loss=0.0, **settings)
model = get_peft_model(model, config)
model.print_trainable_parameters()

started = time.perf_counter()
recipe = TrainConfig(
    steps=steps,
    phases=(draw(0.1, 0.6),),  # a sparsity for each step, so that one adapter serves several tau
    train="routers",
    task=0.0,
    contribution_fit=1.0,
    router_lr=1e-4,
)
records = train(model, [{"input_ids": row[None]} for row in rows], recipe)
seconds = time.perf_counter() - started
tenth = max(1, steps // 10)
first, last = (sum(r["contribution_fit"] for r in part) / tenth for part in (records[:tenth], records[-tenth:]))
print(f"routers' loss {first:.4f} -> {last:.4f} in {steps} steps, {seconds:.0f} s")

set_tau(model, 0.9)
model.save_pretrained(output)
print(f"adapter: {output}")
