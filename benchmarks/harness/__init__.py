"""One harness for every experiment: methods that are written once, tasks that they train on, runs that are kept.

A :class:`Task` is data, a fresh model and an evaluation. A method of ``METHODS`` turns a fresh model into a sparse one.
A :class:`Job` is one method on one task with one learning rate and one seed; :func:`run` does all jobs that the
:class:`Options` ask for, each once, and keeps one JSON file for each.

    task.py      what a task is, and what a method gives back
    knobs.py     how each kind of trained model is brought to a sparsity
    work.py      one job while it runs: training, conversions that are kept
    methods.py   the methods by name
    parts.py     doing what is not done yet, in one of several processes
    jobs.py      which jobs there are
    options.py   what every experiment's command line has
    texts.py     texts as windows of token ids
    store.py     the folder of results
    kept.py      models and tensors in files that hold no code
    earlier.py   records that earlier versions wrote, under today's names
    report.py    what the reports share: curves.py (perplexity), scores.py (scores on two halves)

Example::

    output = Path("OUT")
    task = BooksTask("MODEL", Texts(train, {"books": test}), Store(output).cache, device="cuda")
    options = Options(output, {"held": {}, "static-wanda": {}}, sparsity=(0.5, 0.8), lr=(1e-3,), steps=354)
    outcome = run([task], options)
    print(outcome["done"])
"""

from __future__ import annotations

from benchmarks.harness.jobs import Job, Options, run
from benchmarks.harness.methods import METHODS, Method
from benchmarks.harness.store import Store
from benchmarks.harness.task import Task, Trained

__all__ = ["METHODS", "Job", "Method", "Options", "Store", "Task", "Trained", "run"]
