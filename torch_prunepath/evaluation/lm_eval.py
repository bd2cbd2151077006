"""The command ``prunepath-eval``, and the registration of this library's model with lm-eval."""

from __future__ import annotations

import importlib.util
import sys

from torch_prunepath.console.errors import UserError

MODEL = "prunepath"
"""Name of the model in lm-eval: ``--model prunepath``."""

MODEL_CLASS = "torch_prunepath.integrations.lm_eval:PrunePathLM"
"""Module and name of the model's class."""

NOT_INSTALLED = "lm-eval is not installed: pip install 'torch-prunepath[lm-eval]'"


def register() -> None:
    """Register the model with lm-eval if it is not registered: newer releases find it by its entry point.

    Raises:
        UserError: if lm-eval is not installed, or accelerate, which it needs for Hugging Face models.
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
    """Run the command ``prunepath-eval``: lm-eval's own command line, in which ``--model prunepath`` works."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        print(f"prunepath-eval: error: {error}", file=sys.stderr)
        return 2
    return 0
