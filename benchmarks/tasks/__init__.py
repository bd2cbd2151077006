"""A dense model fine-tuned on a task, then made sparse by each method: for understanding.py and generation.py."""
