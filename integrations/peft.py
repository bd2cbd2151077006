"""PrunePath as a method of PEFT: an adapter holds routers and permutations, and the base model does not change.

Importing this module registers the method with peft, which is needed before peft reads a saved adapter.

import torch_prunepath.integrations.peft
from torch_prunepath.integrations.peft import PrunePathConfig
model = get_peft_model(base, PrunePathConfig(task_type="CAUSAL_LM", tau=0.9))
"""

from __future__ import annotations

import dataclasses
import re
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from torch_prunepath.integrations.peft_build import Made, attach_parts, check_base, layers_of, make, remake
from torch_prunepath.integrations.peft_config import PRUNEPATH, PrunePathConfig
from torch_prunepath.integrations.peft_layer import STORED, PrunePathLayer, site_of
from torch_prunepath.integrations.peft_state import drop_empty, make_sparse, problem_of, shapes_of, states_to_merge
from torch_prunepath.layer.manifest import KNOBS, Manifest
from torch_prunepath.layer.saving import attach
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.tape import RoutingTape
from torch_prunepath.train.terms import Targets

__all__ = ["PrunePathConfig", "PrunePathModel"]


class _OwnConfigs(dict[str, PeftConfig]):
    """The configs of one PrunePathModel by adapter name; configs of another method are refused with a remedy."""

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        self._check(config)
        super().__setitem__(name, config)

    def update(self, configs: Any) -> None:  # type: ignore[override]
        """Add several configs."""
        for name, config in dict(configs).items():
            self[name] = config

    @staticmethod
    def _check(config: PeftConfig) -> None:
        if not isinstance(config, PrunePathConfig):
            raise ValueError(
                f"a {type(config).__name__} cannot be added to a model with PrunePath adapters: put it on the same "
                "base with get_peft_model(model.get_base_model(), config); then both are active"
            )


class PrunePathModel(BaseTuner):
    """The PrunePath adapters of one base model, which ``PeftModel`` holds as ``base_model``.

    Args:
        model: the base model, which is dense and no ``PeftModel``.
        peft_config: config of the first adapter.
        adapter_name: name of the first adapter.
        **kwargs: further arguments of :class:`peft.tuners.tuners_utils.BaseTuner`.

    Raises:
        ValueError: if the base model cannot take the adapter. The base model is then as it was.
    """

    # peft skips modules whose name holds it when it deletes adapters: no layer's name may.
    prefix = f"prunepath.{STORED}."
    tuner_layer_cls = PrunePathLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (peft's own type)
    peft_config: dict[str, PeftConfig]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        check_base(model)
        # Where adapters of another kind are on the base, each keeps its own books.
        others = vars(model).pop("peft_config", None)
        try:
            super().__init__(model, peft_config, adapter_name, **kwargs)
        finally:
            vars(model).pop("peft_config", None)
            if others is not None:
                model.peft_config = others
        own = _OwnConfigs()
        own.update(self.peft_config)
        self.peft_config = own
        self._step = 0

    def layers(self) -> list[PrunePathLayer]:
        """Return the layers that hold the adapters, in module order."""
        return list(layers_of(self.model).values())

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        """Put the adapter whose config is under this name onto the base model.

        Raises:
            ValueError: if the adapter cannot be made or does not fit the base model, which is then as it was.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, PrunePathConfig)
        made = _make(model, config)
        # The caller's config stays his: it may go to another model.
        own = dataclasses.replace(config, manifest=made.manifest.to_dict(), base_sample=made.sample, **_FORGOTTEN)
        trainable = [(p, p.requires_grad) for p in model.parameters()] if _has_adapters(model) else []
        attach_parts(model, made, adapter_name)
        self.peft_config[adapter_name] = own
        self.set_adapter(self.active_adapters, inference_mode=own.inference_mode)
        self._mark_only_adapters_as_trainable(model)
        for parameter, before in trainable:
            parameter.requires_grad = before

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("PrunePath adapters go to the FFNs that find_ffns() finds, not to modules of choice")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's output. While the model trains, the loss of the routers is added to its loss."""
        weight = self._router_loss()
        if not weight:
            return self.model(*args, **kwargs)
        self._step += 1
        fit = TrainConfig(steps=1, task=0.0, contribution_fit=1.0)
        device = next(self.model.parameters()).device
        tape = RoutingTape(self.model, inputs=False, inside=Targets(fit, f"peft {self._step}", device))
        with tape:
            output = self.model(*args, **kwargs)
        loss = getattr(output, "loss", None)
        if loss is not None:
            tape.check(gradient=True)
            terms = [call.inside.terms["contribution_fit"].to(loss.device) for call in tape.calls]
            output["loss"] = loss + weight * torch.stack(terms).mean()
        return output

    def _router_loss(self) -> float:
        """Return the weight of the routers' loss in this call; it is 0 when no router is trained."""
        layers = self.layers() if self.training and torch.is_grad_enabled() and self.active_adapters else []
        if not layers or layers[0].disable_adapters or not layers[0].router.weight.requires_grad:
            return 0.0
        config = self.peft_config[self.active_adapters[0]]
        assert isinstance(config, PrunePathConfig)
        return config.router_loss

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch to an adapter, with its routers, permutation and tau.

        Raises:
            ValueError: if several adapters are asked for at once.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"only one PrunePath adapter can be active at a time, not {', '.join(adapter_name)}: name one"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. Without any adapter, the base model is a dense model again."""
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            for layer in self.layers():
                layer.remove()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Refuse to merge in place; :meth:`merge_and_unload` merges.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a PrunePath adapter cannot be merged in place: call model.merge_and_unload(), which returns a sparse "
            "model with neurons in expert order"
        )

    def _unload_and_optionally_merge(  # type: ignore[override]  # peft declares None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = self.layers()
        names = adapter_names or self.active_adapters
        if merge:
            states = states_to_merge(layers, names)
            config = self.peft_config[names[0]]
            assert isinstance(config, PrunePathConfig) and config.manifest is not None
            make_sparse(self.model, layers, states, Manifest.from_dict(config.manifest).config)
        for layer in layers:
            layer.remove()
        if merge:
            attach(self.model)
        return self.model

    # What is saved: keys without the adapter's name, ``<FFN>.prunepath.router.weight``.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, PrunePathConfig) and config.manifest is not None
        layers = layers_of(model)
        knobs: dict[str, dict[str, Any]] = {
            layer.ffn.name: {knob: float(getattr(layer.adapters[adapter_name], knob)) for knob in KNOBS}
            for layer in layers.values()
        }
        manifest = Manifest.from_dict(config.manifest)
        parts = tuple(dataclasses.replace(part, **knobs[site_of(part.ffn)]) for part in manifest.layers)
        config.manifest = dataclasses.replace(manifest, layers=parts).to_dict()
        prefixes = tuple(f"{name}.{STORED}.{adapter_name}." for name in layers)
        return {key: value for key, value in state_dict.items() if key.startswith(prefixes)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"\.{STORED}\.{re.escape(adapter_name)}\.(?=[a-z_.]+$)", ".", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        expected = {
            f"base_model.model.{name.removeprefix('base_model.model.')}.{tensor}": (
                f"{name}.{STORED}.{adapter_name}.{tensor}",
                shape,
            )
            for name, layer in layers_of(model).items()
            for tensor, shape in shapes_of(layer.adapters[adapter_name]).items()
        }
        problem = problem_of(state_dict, {key: shape for key, (_, shape) in expected.items()})
        if problem is not None:
            if drop_empty(model, adapter_name):
                model.peft_config.pop(adapter_name, None)  # type: ignore[union-attr, operator]
            raise ValueError(f"{problem}; save the adapter again, or load it onto its own base model")
        # The rest is PEFT's, such as embeddings that were resized.
        return {expected[key][0] if key in expected else key: value for key, value in state_dict.items()}


_FOR_SPARSIFY = ("calibration", "tokenizer", "include", "exclude", "progress")
"""Names of the config's fields that a new adapter is made with, and that :func:`torch_prunepath.sparsify` takes."""

_FORGOTTEN = MappingProxyType(dict.fromkeys(("calibration", "tokenizer", "include", "exclude")))
"""What a config no longer holds once its adapter is made."""


def _make(model: nn.Module, config: PrunePathConfig) -> Made:
    if config.manifest is None:
        given = {name: getattr(config, name) for name in _FOR_SPARSIFY}
        return make(model, config.sparsify_config(), config.tau, **given)
    return remake(model, Manifest.from_dict(config.manifest), config.base_sample, config.base_model_name_or_path)


def _has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


PEFT_TYPE_TO_CONFIG_MAPPING[PRUNEPATH] = PrunePathConfig
PEFT_TYPE_TO_TUNER_MAPPING[PRUNEPATH] = PrunePathModel
PEFT_TYPE_TO_PREFIX_MAPPING[PRUNEPATH] = PrunePathModel.prefix
