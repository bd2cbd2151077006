"""lm-eval with this library's model in it: ``prunepath-eval``, and what every use of lm-eval starts with."""

from __future__ import annotations

import importlib.util
import sys

from torch_prunepath.console.errors import UserError

MODEL = "prunepath"
"""What the model is called in lm-eval: ``--model prunepath``."""

MODEL_CLASS = "torch_prunepath.integrations.lm_eval:PrunePathLM"

NOT_INSTALLED = "lm-eval is not installed: pip install 'torch-prunepath[lm-eval]'"


def register() -> None:
    """Make lm-eval know the model, unless it does: newer releases find it by its entry point.

    Raises:
        UserError: if lm-eval, or what it runs Hugging Face models with, is not installed.
    """
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(NOT_INSTALLED)
    # First, because lm-eval fills in its own models only where it finds none registered.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=MODEL_CLASS)


def main() -> int:
    """The command ``prunepath-eval``: lm-eval's own command line, in which ``--model prunepath`` works."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        print(f"prunepath-eval: error: {error}", file=sys.stderr)
        return 2
    return 0
