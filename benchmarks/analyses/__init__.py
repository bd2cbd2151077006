"""Analyses of routed experts, each with a table, a plot and results as JSON.

    python -m benchmarks.analyses reconstruction --model DIR_OR_GGUF --data FOLDER -o OUT
    python -m benchmarks.analyses initialisation --model DIR_OR_GGUF --data FOLDER --steps 300 --seeds 0 1 2 -o OUT
    python -m benchmarks.analyses ablations      --model DIR_OR_GGUF --data FOLDER --steps 300 -o OUT
    python -m benchmarks.analyses taus           --model DIR_OR_GGUF --data FOLDER --checkpoint NAME=DIR -o OUT

reconstruction: how far each FFN's output is off if it computes its k best experts only, against k, by several routers
and by the experts' true contributions (figure 2 of arXiv 2605.28283). initialisation: perplexity by partition and
router initialisation, after conversion and after training (figure 7). ablations: the same by gate, selection rule and
losses. taus: perplexity and realised sparsity of one checkpoint over tau (figure 8).

Models are converted and trained as ``benchmarks.adaptation`` does it, on the same texts; without ``--steps`` nothing is
trained. Each part of an analysis writes one JSON file once it is done, and is not done again, so that the same command
goes on where it was stopped. ``results.json``, ``results.md`` and ``results.png`` in the folder are those of the last
command. ``OUT/cache`` can be removed when all is done; its files are pickles: use a folder that nobody else writes to.
"""
