"""One FFN of a base model under PrunePath adapters.

The FFN runs as it is, every neuron, in the base model's order, through whatever other adapters wrap its projections;
what enters its last projection is weighed: neurons of inactive experts by 0, others by their expert's weight. So no
adapter ever moves a weight of the base model: adapters with permutations of their own live side by side, those of other
kinds never see neurons change places, and a disabled adapter costs the dense model no bit. What this gives away is
speed, until ``merge_and_unload`` has put the neurons into expert order.

Shapes: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from torch_prunepath.config import FFNSpec
from torch_prunepath.layer import ExpertsSpec, RoutedExperts
from torch_prunepath.layer.buffers import Float32Buffers
from torch_prunepath.layer.ffn import FFNView, bias_of, weight_out_in
from torch_prunepath.layer.handoff import Chosen, Handoff
from torch_prunepath.layer.hooks import StandIn
from torch_prunepath.layer.norms import column_norms, refresh_after_loading, row_norms
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.sparse import Neurons, Norms
from torch_prunepath.select import keep_counted
from torch_prunepath.weights import Threshold

STORED = "routing"
"""The name of a layer's adapters in state dicts, ``prunepath.routing.<adapter>.router.weight``, in place of their
container's: adapters of other kinds would save them as a part of themselves."""


class AdapterState(Float32Buffers):
    """What one adapter holds for one FFN: its router, the permutation that forms its experts, tau and thresholds.

    Norms of weights, which thresholds are compared with, are there once a threshold was set. Those of neurons are in
    the base model's order.

    Args:
        experts: how its experts are chosen and weighed.
        budget: how much of the model's tau this layer takes part in.
        router: ``Router(D, E)``.
        order_F: int, the permutation.
        tau: in (0, 1].
        filled: whether router and permutation are real; False if a state dict is still to bring them.
    """

    permutation: Tensor
    tau: Tensor
    theta_x: Tensor
    theta_h: Tensor
    column_norm_D: Tensor | None
    row_norm_F: Tensor | None
    expert_of_F: Tensor

    def __init__(
        self, experts: ExpertsSpec, budget: float, router: Router, order_F: Tensor, tau: float, filled: bool
    ) -> None:
        super().__init__()
        self.experts, self.budget, self.filled = experts, budget, filled
        self.router = router
        self.register_buffer("permutation", order_F.to(torch.int32))
        self.register_buffer("tau", torch.tensor(tau, dtype=torch.float32, device=order_F.device))
        for name in ("theta_x", "theta_h"):
            self.register_buffer(name, torch.zeros_like(self.tau), persistent=False)
        for name in NORMS:
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("expert_of_F", self._experts_of_neurons(), persistent=False)

    def _experts_of_neurons(self) -> Tensor:
        """Which expert each neuron of the base model belongs to, int64 ``[F]``."""
        return torch.argsort(self.permutation.to(torch.int64)) // self.experts.expert_size

    @torch.no_grad()
    def restore_thresholds(self, view: FFNView, theta_x: float, theta_h: float) -> None:
        """Have these thresholds, with norms of the base model's FFN."""
        self.theta_x.fill_(theta_x)
        self.theta_h.fill_(theta_h)
        gate = [] if view.gate_FD is None else [view.gate_FD]
        self.column_norm_D, self.row_norm_F = column_norms(view.up_FD, *gate), row_norms(view.down_FD)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}permutation" in state_dict:
            self.expert_of_F = self._experts_of_neurons()
            self.filled = True


NORMS = ("column_norm_D", "row_norm_F")
"""Buffers of an adapter that hold norms of the base model's weights."""


class InExpertOrder(StandIn):
    """A projection of the FFN, without the adapters around it, as if its neurons stood in the active adapter's order.

    For what reads an FFN's weights expert by expert.

    Args:
        layer: the layer whose FFN it is.
        part: ``"up"``, ``"gate"`` or ``"down"``, the field of the FFN's spec.
    """

    def __init__(self, layer: PrunePathLayer, part: str) -> None:
        super().__init__()
        vars(self)["layer"] = layer  # not as a submodule: it holds this one
        self.part = part

    def _order(self) -> Tensor:
        layer: PrunePathLayer = vars(self)["layer"]
        order_F = layer.permutation.to(torch.int64)
        fused = self.part == "up" and layer.spec.fused is not None
        return torch.cat([order_F, order_F + layer.spec.ffn_size]) if fused else order_F

    def _module(self) -> nn.Module:
        layer: PrunePathLayer = vars(self)["layer"]
        return layer.module_of(self.part)

    @property
    def weight(self) -> Tensor:
        """The projection's weight ``[out, in]``, a copy."""
        return weight_out_in(innermost(self._module())).index_select(1 if self.part == "down" else 0, self._order())

    @property
    def bias(self) -> Tensor | None:
        """The projection's bias ``[out]``, a copy, or None."""
        bias = bias_of(innermost(self._module()))
        return bias if bias is None or self.part == "down" else bias.index_select(0, self._order())

    def called_first(self) -> nn.Module:
        """The module that runs, other adapters around it included."""
        return self._module()

    def called_last(self) -> nn.Module:
        """The same module."""
        return self._module()


def innermost(module: nn.Module) -> nn.Module:
    """The base model's own module inside the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class PrunePathLayer(StandIn, RoutedExperts, BaseTunerLayer):
    """The adapters of one FFN, as a child of the module that holds it: ``<FFN>.prunepath``.

    To the library it is a sparse layer, that of the active adapter; to PEFT a tuner layer.

    Args:
        owner: the module that ``spec.name`` names.
        spec: the FFN in the base model.
    """

    adapter_layer_names = ("adapters",)
    other_param_names = ()

    def __init__(self, owner: nn.Module, spec: FFNSpec) -> None:
        nn.Module.__init__(self)
        vars(self)["owner"] = owner  # not as a submodule: this one is a child of it
        self.spec, self.child_name = spec, child_name(spec)
        # The FFN in expert order: whole, inside this module.
        name = site_of(spec)
        gate = None if spec.gate is None else "gate"
        self.ffn = dataclasses.replace(spec, name=name, split=False, up="up", gate=gate, down="down")
        for part in filter(None, ("up", gate, "down")):
            self.add_module(part, InExpertOrder(self, part))
        self.adapters = nn.ModuleDict()
        self.routing_hooks = OrderedDict()
        self._active_adapter, self._disable_adapters, self.merged_adapters = [], False, []
        self._handoff = Handoff()
        self._handles: dict[str, Any] = {}
        self._down: nn.Module | None = None
        self.register_load_state_dict_post_hook(refresh_after_loading)
        self.register_state_dict_post_hook(_store)
        self.register_load_state_dict_pre_hook(_restore)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__reduce_ex__(self, protocol)

    # What a sparse layer has, from the active adapter.

    def state(self) -> AdapterState:
        """What the active adapter holds.

        Raises:
            ValueError: if none is active.
        """
        active = [name for name in self.active_adapters if name in self.adapters]
        if not active:
            raise ValueError("no PrunePath adapter is active: call set_adapter(name) first")
        return self.adapters[active[0]]  # type: ignore[return-value]

    @property
    def router(self) -> Router:  # type: ignore[override]
        """The active adapter's router."""
        return self.state().router

    @property
    def tau(self) -> Tensor:  # type: ignore[override]
        """The active adapter's tau, 0-d float32."""
        return self.state().tau

    @property
    def theta_x(self) -> Tensor:  # type: ignore[override]
        """The active adapter's threshold on inputs, 0-d float32."""
        return self.state().theta_x

    @property
    def theta_h(self) -> Tensor:  # type: ignore[override]
        """The active adapter's threshold on neurons, 0-d float32."""
        return self.state().theta_h

    @property
    def has_norms(self) -> bool:  # type: ignore[override]
        """Whether the active adapter ever had a threshold."""
        return self.state().column_norm_D is not None

    @property
    def column_norm_D(self) -> Tensor:  # type: ignore[override]
        """Norms of the columns of the base model's [gate; up], float32 ``[D]``."""
        return self.norm("column_norm_D")

    def norm(self, name: str) -> Tensor:
        """One of the norms of the base model's weights."""
        norm: Tensor = getattr(self.state(), name)
        return norm

    def weights_with_norms(self) -> Norms:
        """What thresholds compare with: the base model's weights, neurons in its order."""
        view = FFNView.of_owner(vars(self)["owner"], self.spec)
        first = [weight_out_in(module) for module in (view.up, view.gate) if module is not None]
        return {"column_norm_D": (column_norms, tuple(first)), "row_norm_F": (row_norms, (view.down_FD,))}

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def keep_norms(self) -> None:
        """Begin to keep norms for the active adapter, or compute those that are kept again."""
        if not self.has_norms:
            for name, norm in self.norms_now().items():
                setattr(self.state(), name, norm)
        self.refresh_norms()

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """Compute the norms that the adapters keep again, in place, if the weights can be read."""
        keepers = [state for state in self.adapters.values() if state.column_norm_D is not None]
        if keepers and self.can_keep_norms():
            norms = self.norms_now()
            for state in keepers:
                for name, norm in norms.items():
                    getattr(state, name).copy_(norm)

    @property
    def permutation(self) -> Tensor:  # type: ignore[override]
        """The active adapter's order of neurons, int32 ``[F]``."""
        return self.state().permutation

    @property
    def experts(self) -> ExpertsSpec:  # type: ignore[override]
        """How the active adapter's experts are chosen and weighed."""
        return self.state().experts

    @property
    def budget(self) -> float:  # type: ignore[override]
        """How much of the model's tau the active adapter takes part in here."""
        return self.state().budget

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        nn.Module._apply(self, fn, recurse)  # each adapter looks after its own tau
        self.refresh_norms()
        return self

    def called_first(self) -> nn.Module:
        """The module that gets the FFN's input."""
        return self.module_of("up") if self.spec.split else vars(self)["owner"]  # type: ignore[no-any-return]

    def called_last(self) -> nn.Module:
        """The module that gives the FFN's output."""
        return self.module_of("down") if self.spec.split else vars(self)["owner"]  # type: ignore[no-any-return]

    # Watching the FFN.

    def module_of(self, part: str) -> nn.Module:
        """The FFN's ``"up"``, ``"gate"`` or ``"down"`` as the model calls it, other adapters around it included."""
        owner: nn.Module = vars(self)["owner"]
        return owner.get_submodule(getattr(self.spec, part))

    def install(self) -> None:
        """Become a child of the FFN, and watch it."""
        owner: nn.Module = vars(self)["owner"]
        owner.add_module(self.child_name, self)
        # Inside of the adapters around it, which may go: all of them hand their input on.
        first = innermost(self.module_of("up")) if self.spec.split else owner
        self._handles["first"] = first.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._follow_down()

    def remove(self) -> None:
        """Leave the FFN as if there had never been an adapter."""
        vars(self)["owner"]._modules.pop(self.child_name, None)
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._handoff.routing = vars(self)["_down"] = None

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._handoff.routing = None
        if self._disable_adapters or not self.active_adapters:
            return None
        if not self.state().filled:
            raise ValueError(
                "the adapter's configuration is here, but not its weights: load both with "
                "PeftModel.from_pretrained(base, directory), or make a new PrunePathConfig"
            )
        self._follow_down()
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        mask_TE, weights_TE = self.route(x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1]))
        self._handoff.routing = Chosen(mask_TE, weights_TE, self.theta_h if self.has_norms else None)
        if not self.has_norms:
            return None
        x = keep_counted(x, self.inputs_threshold)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

    def _follow_down(self) -> None:
        """Watch the last projection, from outside of what may have been put around it since."""
        down = self.module_of("down")
        if down is not vars(self)["_down"]:
            if "down" in self._handles:
                self._handles.pop("down").remove()
            vars(self)["_down"] = down
            self._handles["down"] = down.register_forward_pre_hook(self._weigh)

    def _weigh(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        routing = self._handoff.take()
        if routing is None:
            return None
        mask_TE, weights_TE, theta_h = routing
        h, expert_of_F = args[0], self.state().expert_of_F
        active_TF = mask_TE.index_select(1, expert_of_F)
        h_TF = h.reshape(-1, h.shape[-1]).masked_fill(~active_TF, 0.0)
        if theta_h is not None:
            neurons = Threshold(theta_h, self.norm("row_norm_F"))
            for recorder in self.neuron_recorders:
                recorder.note_neurons(Neurons(h_TF, active_TF, neurons, h.shape[:-1]))
            h_TF = keep_counted(h_TF, neurons)
        if weights_TE is not None:
            h_TF = h_TF * weights_TE.index_select(1, expert_of_F).to(h_TF.dtype)
        return h_TF.reshape(h.shape), *args[1:]

    # What PEFT asks of a tuner layer.

    def get_base_layer(self) -> nn.Module:
        """The FFN's first projection, which tells where the weights are and in which dtype."""
        return innermost(self.module_of("up"))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: the adapter changes no weight. Other adapters' ``merge_adapter`` call it."""

    def unmerge(self) -> None:
        """Do nothing: see :meth:`merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        if adapter_name in self.adapters:
            self.adapters[adapter_name].to(device or weight_out_in(self.get_base_layer()).device)


def child_name(spec: FFNSpec) -> str:
    """Name of a layer as a child of its FFN's owner, which may hold several FFNs that are split."""
    return "_".join(["prunepath", *(spec.up.split(".") if spec.split else [])])


def site_of(spec: FFNSpec) -> str:
    """Qualified name of an FFN's layer in the base model."""
    return ".".join(filter(None, (spec.name, child_name(spec))))


def _store(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    _rename(state_dict, f"{prefix}adapters.", f"{prefix}{STORED}.")


def _restore(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    _rename(state_dict, f"{prefix}{STORED}.", f"{prefix}adapters.")


def _rename(state_dict: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state_dict if key.startswith(old)]:
        state_dict[new + key.removeprefix(old)] = state_dict.pop(key)
