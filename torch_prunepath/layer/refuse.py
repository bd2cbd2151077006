"""What others have put around a sparse model since: a model around it, adapters around its projections."""

from __future__ import annotations

from torch import nn

from torch_prunepath.layer import RoutedExperts, SparseFFN
from torch_prunepath.layer.ffn import FFNView, is_shard
from torch_prunepath.layer.sparse import SparseDown, SparseUp


def refuse_wrapped(name: str, layer: RoutedExperts, view: FFNView) -> None:
    """Refuse to move the neurons of a sparse layer where something else counts on their order.

    Raises:
        ValueError: if the layer is an adapter's, or a projection was replaced since.
    """
    if not isinstance(layer, SparseFFN | SparseUp):
        raise ValueError(f"{name} is a PEFT adapter's, and the base model is dense: call model.unload() instead")
    known = layer.projection_types if isinstance(layer, SparseFFN) else (SparseUp, SparseDown)
    for part in ("up", "gate", "down"):
        place, module = getattr(layer.ffn, part), getattr(view, part)
        if place != getattr(view.spec, part) or not (module is None or _as_made(module, known)):
            raise ValueError(
                f"{place} of {view.spec.name or 'the model'} was replaced since, by what would stay in expert order: "
                "if it is an adapter's, call merge_and_unload() or unload() of that one first"
            )


def _as_made(module: nn.Module, known: tuple[type, ...]) -> bool:
    """Whether a projection is of a class that conversion left, its weight plain: a subclass may be a quantised one."""
    same = isinstance(module, SparseUp | SparseDown) or any(type(module) is kind for kind in known)
    return same and type(module.weight) is nn.Parameter


def refuse_shards(name: str, layer: nn.Module) -> None:
    """Refuse a layer of which each rank holds a part (tensor parallelism): it would compute with that part alone.

    Parts that FSDP2 gathers before the layer runs are none of these.

    Raises:
        ValueError: if a weight in it is a ``DTensor`` of a mesh that has a dimension ``"tp"``.
    """
    for weight in layer.parameters():
        if is_shard(weight) and "tp" in (weight.device_mesh.mesh_dim_names or ()):  # type: ignore[attr-defined]
            raise ValueError(
                f"{name} is sparse, and its weights are shared out over ranks (tensor parallelism), which sparse "
                "layers cannot do: load the model without tp_plan, whole on each GPU, or spread over them with "
                'device_map="auto"; densify(model) makes a dense checkpoint, which can be shared out'
            )


def refuse_wrapper(model: object) -> None:
    """Refuse a wrapper that stands in a model's place: names inside it are not those that a checkpoint has.

    Raises:
        ValueError: if the model is wrapped for several devices, compiled, or has adapters.
        TypeError: if it is no model at all.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model (torch.nn.Module) is needed, not a {kind}: load it with from_pretrained first")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "DataParallel copies the model for each batch: sparsify(model.module), and run one process a GPU, with "
            "torchrun"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("the model is in DistributedDataParallel: sparsify(model.module) before it is wrapped")
    if isinstance(model._modules.get("_orig_mod"), nn.Module):
        raise ValueError("the model is compiled: sparsify(model._orig_mod), and compile it afterwards")
    compiled = next((name for name, module in model.named_modules() if _is_compiled(module)), None)
    if compiled is not None:
        raise ValueError(
            f"{compiled or 'the model'} is compiled, and its graph has the dense weights: make the model sparse before "
            "anything in it is compiled"
        )
    if hasattr(type(model), "get_base_model"):
        raise ValueError(
            f"the model is a {kind}: call merge_and_unload() first; or, if its adapters are not on feed-forward "
            "networks, sparsify(model.get_base_model())"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, or the module is what ``torch.compile`` returned."""
    return module._compiled_call_impl is not None or isinstance(module._modules.get("_orig_mod"), nn.Module)
