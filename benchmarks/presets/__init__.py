"""The paper's experiments (PrunePath, arXiv 2605.28283) as named presets, one file a figure.

python -m benchmarks figure3 --dry-run              what would run, and what it costs; no network, no weights
python -m benchmarks figure3 --stand-in -o OUT      the same code on a tiny random model and made-up data
python -m benchmarks figure3 -o OUT                 the experiment; model and data come from the hub
python -m benchmarks figure3 --model DIR --data DIR -o OUT      the experiment without a network

preset.py     what a preset is: a model, parts, and where each setting comes from
settings.py   settings that several figures share, with their sources
cost.py       tokens, operations, hours and memory of the runs
tasks.py      tasks that only presets have: E2E, XSum, Tulu-v2 with MMLU, GLUE by name
stand_in.py   tiny models, tokenizers and data
work.py       doing the parts and reporting
command.py    the command line
"""
