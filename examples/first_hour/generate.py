"""Write with a sparse model: generate.py MODEL."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_prunepath import record_sparsity  # before from_pretrained: without the library the model loads as dense

model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The Python programming language is", return_tensors="pt")
with record_sparsity(model) as record:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
print(f"{record.sparsity:.1%} of the FFN neurons were left out")
