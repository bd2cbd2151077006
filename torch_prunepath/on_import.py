"""Doing something as soon as another package's module is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_import(name: str, then: Callable[[], object]) -> None:
    """Call ``then`` once the module ``name`` has been executed: now, if it has been, or else when somebody imports it.

    The packages around the module may be only half imported at that moment: ``then`` must not need them.
    """
    if name in sys.modules:
        then()
    else:
        # First, because the finder that knows where the module lies ends the search.
        sys.meta_path.insert(0, _Watcher(name, then))


class _Watcher(MetaPathFinder):
    """Finds one module as the other finders do, and lets its loader call ``then`` at the end; then goes away."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        others = [finder for finder in sys.meta_path if not isinstance(finder, _Watcher)]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        # Looking for a spec is no import: it may be all that the caller wants. So the loader has to tell.
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == self._name and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._then()

            # On the one loader rather than around it, so that whatever else it can do stays.
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
