"""Load a base model and its adapter, and save them as one sparse model: merge.py ADAPTER OUTPUT."""

import sys

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import torch_prunepath.integrations.peft  # noqa: F401  (makes peft know the method)

adapter, output = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
sparse = model.merge_and_unload()
sparse.save_pretrained(output)
tokenizer.save_pretrained(output)
print(f"sparse model: {output}")
