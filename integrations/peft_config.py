"""The configuration of a PrunePath adapter, and the name of the method in PEFT."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from peft import PeftConfig

from torch_prunepath.config import SparsifyConfig, check_tau
from torch_prunepath.layer.manifest import Manifest


class _Type(str):
    """A name of a method that acts like a member of peft's enumeration of methods, which cannot be extended."""

    @property
    def value(self) -> str:
        """Name of the method in ``adapter_config.json``."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


PRUNEPATH = _Type("PRUNEPATH")
"""The method's name in PEFT."""

_AT_RUN_TIME = ("calibration", "tokenizer", "include", "exclude", "progress")
"""Names of the fields that are not saved with an adapter."""

_SPARSIFY = tuple(f.name for f in dataclasses.fields(SparsifyConfig))
_HINTS = get_type_hints(SparsifyConfig)
# Not SparsifyConfig itself: it is frozen, and peft changes configs.
_Settings = dataclasses.make_dataclass(
    "_Settings", [(f.name, _HINTS[f.name], field(default=f.default)) for f in dataclasses.fields(SparsifyConfig)]
)


@dataclass
class PrunePathConfig(_Settings, PeftConfig):  # type: ignore[misc, valid-type]
    """The configuration of a PrunePath adapter: every field of :class:`torch_prunepath.SparsifyConfig`, and these.

    Attributes:
        tau: router mass that the active experts must reach, in (0, 1]. :func:`torch_prunepath.set_tau` and
            :func:`torch_prunepath.set_sparsity` change that of the adapter, which is saved with it.
        router_loss: weight of the loss that fits routers to what their experts contribute (``contribution_fit``). It is
            added to the loss that the model returns while it trains. With ``gate="one"`` nothing else trains routers.
        calibration: data for a new adapter, as :func:`torch_prunepath.sparsify` takes it. It is not saved, and neither
            are ``tokenizer``, ``include``, ``exclude`` and ``progress``.
        tokenizer: tokenizer for texts.
        include: the FFNs that a new adapter is made for, as :func:`torch_prunepath.sparsify` takes it; None: all. It is
            no ``target_modules``, whose names are those of single layers and end where a module's name ends.
        exclude: which of these to leave out. A saved adapter's ``manifest`` lists its FFNs.
        progress: show progress bars.
        manifest: description of the adapter's layers; ``get_peft_model`` fills it in.
        base_sample: some weights of the base model, by which it is recognised; ``get_peft_model`` fills them in.

    Raises:
        ValueError: if a value is not allowed, or a saved adapter is damaged or of a newer format.
    """

    tau: float = 0.9
    router_loss: float = 1.0
    calibration: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    include: Any = field(default=None, repr=False, compare=False)
    exclude: Any = field(default=None, repr=False, compare=False)
    progress: bool = field(default=True, repr=False, compare=False)
    manifest: dict[str, Any] | None = field(default=None, repr=False)
    base_sample: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PRUNEPATH
        check_tau(self.tau)
        self.sparsify_config()
        if not self.router_loss >= 0:
            raise ValueError(f"router_loss={self.router_loss} must not be negative: 0 turns it off")
        if self.manifest is not None:
            Manifest.from_dict(self.manifest)

    def sparsify_config(self) -> SparsifyConfig:
        """Return the fields that say how experts and routers are built."""
        return SparsifyConfig(**{name: getattr(self, name) for name in _SPARSIFY})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``, JSON-ready."""
        saved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _AT_RUN_TIME}
        return copy.deepcopy(saved)
