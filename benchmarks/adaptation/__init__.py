"""Perplexity against sparsity after equal training: every method on the same model, data, tokens and seeds.

    python -m benchmarks.adaptation run --model DIR_OR_GGUF --data FOLDER --device cuda --bf16 -o RESULTS
    python -m benchmarks.adaptation report RESULTS

Each run writes one JSON file once it is done. Runs that are done are skipped, so that the same command goes on where it
was stopped; and several processes may work on one folder at the same time, on other runs each. Converted models and
token ids are kept in ``RESULTS/cache``, which can be removed when all is done. The files in it are pickles: use a
folder that nobody else writes to. With ``--session-seconds 1e-9`` nothing is trained, only texts are tokenised:
``cache/tokens-*.pt`` may be copied to another machine, the texts still being needed there.

Recipes change without code, for every method chosen or for one, and the report keeps them apart:

    --methods held static-norm --set distill_logits=1 --set held:expert_size=16
    --methods held --set "phases=[('sparsity', 0.0, 'target', 1.0), ('sparsity', 'target', 'target', 4.0)]"

Shapes: N windows of C tokens.
"""
