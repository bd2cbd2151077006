"""Progress bars, by tqdm."""

from __future__ import annotations

import os
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, progress: bool | None = True, **how: Any) -> Any:
    """A bar of tqdm, which tqdm's own settings in the environment (``TQDM_DISABLE``) can hide.

    Args:
        *args: passed on: what to iterate over.
        progress: True: show it; False: do not; None: show it on a terminal alone.
        **how: passed on: ``total``, ``desc``, ``unit``.
    """
    # tqdm takes its settings from the environment only where the call does not say them.
    if progress is False:
        how["disable"] = True
    elif "TQDM_DISABLE" not in os.environ:
        how["disable"] = False if progress else None
    return tqdm(*args, **how)
