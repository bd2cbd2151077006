"""docs/mistakes.md: every row is provoked, and must give the message that the table quotes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import NOTHING_TO_FIND, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tiny_llama import byte_tokenizer, save_tiny_llama, tiny_llama
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import prune
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)

from torch_prunepath import (
    SparsifyConfig,
    densify,
    describe,
    load,
    rebuild,
    record_sparsity,
    set_budget,
    set_sparsity,
    set_tau,
    set_threshold_shares,
    set_thresholds,
    sparse_layers,
    sparsify,
)
from torch_prunepath.baselines import lte
from torch_prunepath.integrations.lm_eval import PrunePathLM
from torch_prunepath.integrations.peft import PrunePathConfig
from torch_prunepath.train import TrainConfig, train

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
CONFIG = SparsifyConfig(expert_size=8, partition="kmeans", router="centroid", budget="uniform")
Model = Any


def rows() -> dict[str, str]:
    """The table: mistake -> message."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| Mistake "):
            mistake, message, remedy = (cell.strip() for cell in line.strip("| ").split(" | "))
            assert message[0] == message[-1] == "`" and remedy, line
            found[mistake] = message[1:-1]
    return found


# Each mistake takes the model that it is made with, and a folder.
MISTAKES: dict[str, Callable[[Model, Path], Any]] = {}
DENSE: set[str] = set()


def on_sparse(name: str) -> Callable[[Callable[[Model, Path], Any]], Callable[[Model, Path], Any]]:
    """Register what is done to a sparse model."""

    def register(make: Callable[[Model, Path], Any]) -> Callable[[Model, Path], Any]:
        MISTAKES[name] = make
        return make

    return register


def on_dense(name: str) -> Callable[[Callable[[Model, Path], Any]], Callable[[Model, Path], Any]]:
    """Register what is done to a dense model."""
    DENSE.add(name)
    return on_sparse(name)


def convert(model: Any, **settings: Any) -> Any:
    return sparsify(model, **{"config": CONFIG, "progress": False, **settings})


def quantised(model: Any) -> Any:
    """A copy whose weights are of another dtype than floating point."""
    model = copy.deepcopy(model)
    for layer in sparse_layers(model).values():
        layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.to(torch.int8), requires_grad=False)
    return model


def with_thresholds(model: Any) -> Any:
    model = copy.deepcopy(model)
    set_thresholds(model, inputs=0.5)
    return describe(model)


on_sparse("tau of 0, above 1, or in per cent")(lambda model, _: set_tau(model, 90))
on_sparse("a target sparsity in per cent")(lambda model, _: set_sparsity(model, 50, token_ids(), progress=False))
on_sparse("a target sparsity that experts are too large for")(
    lambda model, _: set_sparsity(model, 0.99, token_ids(), progress=False)
)
on_sparse("a list of tau of the wrong length")(lambda model, _: set_tau(model, [0.5, 0.6, 0.7]))
on_sparse("tau that is no number")(lambda model, _: set_tau(model, "0.9"))  # type: ignore[arg-type]
on_sparse("tau for a layer that is not there")(lambda model, _: set_tau(model, {"layers.0.mlp": 0.5}))
on_sparse("a threshold that is negative, NaN or infinite")(lambda model, _: set_thresholds(model, inputs=-1.0))
on_sparse("a threshold that is no number")(lambda model, _: set_thresholds(model, neurons="0.5"))  # type: ignore[arg-type]
on_sparse("a share in per cent")(lambda model, _: set_threshold_shares(model, token_ids(), inputs=33))
on_sparse("thresholds without values")(lambda model, _: set_thresholds(model))
on_sparse("thresholds for weights that cannot be read")(lambda model, _: set_thresholds(quantised(model), inputs=0.5))
on_sparse("a manifest with thresholds, for a model without weights")(
    lambda model, _: rebuild(tiny_llama().to("meta"), with_thresholds(model))
)
on_sparse("a budget in per cent")(lambda model, _: set_budget(model, 50))
on_sparse("a budget without data, the first time")(lambda model, _: set_budget(model, 0.5))
on_sparse("a budget that is out of reach")(lambda model, _: set_budget(model, 0.01, token_ids(), progress=False))
on_sparse("tau, or a sparsity, and bytes both given")(
    lambda model, _: PrunePathLM(pretrained=model, tokenizer=byte_tokenizer(), tau=0.5, bytes=0.5)
)
on_dense("a dense model given to what needs a sparse one")(lambda model, _: set_tau(model, 0.5))
on_sparse("a model made sparse twice")(lambda model, _: convert(model))
on_dense("a name in place of a model")(lambda model, _: convert("some/name"))
on_dense("a dict in place of a SparsifyConfig")(lambda model, _: convert(model, config={"expert_size": 8}))
on_dense("a model without feed-forward networks that are supported")(
    lambda model, _: convert(NOTHING_TO_FIND["mamba"]()[0])
)
on_dense("a model in DataParallel")(lambda model, _: convert(nn.DataParallel(model)))
on_dense("a compiled model")(lambda model, _: convert(torch.compile(tiny_llama())))


on_sparse("a view of all parameters as one vector, or pruning by torch, or LBFGS")(
    lambda model, _: nn.utils.parameters_to_vector(model.parameters())
)
on_sparse("safetensors' save_file of a state dict")(
    lambda model, folder: save_file(model.state_dict(), folder / "weights.safetensors")
)


@on_dense("a model with a compiled module")
def _(model: Model, folder: Path) -> None:
    partly = tiny_llama()
    partly.model.layers[0].mlp.compile(backend="eager")
    convert(partly)


@on_dense("a model made under inference_mode")
def _(model: Model, folder: Path) -> None:
    with torch.inference_mode():
        made = tiny_llama()
    convert(made)


@on_dense("a dense model with a sparse model's config")
def _(model: Model, folder: Path) -> None:
    convert(type(model)(convert(tiny_llama()).config))


@on_dense("calibration data that miss an FFN")
def _(model: Model, folder: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.used(x)
            return found

    convert(Half(), config=SparsifyConfig(), calibration={"x": torch.randn(4, 16, 8)})


on_dense("calibration data that nothing uses")(lambda model, _: convert(model, calibration=token_ids()))
on_dense("a setting that does not exist")(lambda model, _: SparsifyConfig(router="trained"))  # type: ignore[arg-type]


def calibrate(model: Model, *texts: str, **settings: Any) -> Any:
    return convert(model, config=SparsifyConfig(), calibration=list(texts), **settings)


on_dense("texts without a tokenizer")(lambda model, _: calibrate(model, "some text"))
on_dense("texts that are empty")(lambda model, _: calibrate(model, "", "", tokenizer=byte_tokenizer()))
on_dense("a calibration text that is too short")(
    lambda model, _: calibrate(model, "a", "b", tokenizer=byte_tokenizer())
)


def given(model: Model, data: Any, **settings: Any) -> Any:
    return convert(model, config=SparsifyConfig(), calibration=data, **settings)


on_dense("a data set of texts without a tokenizer")(
    lambda model, _: given(model, [{"text": "some text", "label": 1}, {"text": "more", "label": 0}])
)
on_dense("a data set with several columns of text")(
    lambda model, _: given(model, [{"question": "why?", "answer": "because"}] * 3, tokenizer=byte_tokenizer())
)
on_dense("chats without a chat template")(
    lambda model, _: given(model, [[{"role": "user", "content": "hello"}]], tokenizer=byte_tokenizer())
)
on_dense("calibration data of padding alone")(
    lambda model, _: given(model, {"input_ids": token_ids(), "attention_mask": torch.zeros_like(token_ids())})
)
on_dense("token ids of another model")(lambda model, _: given(model, [[1, 2, 300] * 8] * 3))
on_sparse("a negative token id")(lambda model, _: set_sparsity(model, 0.3, {"input_ids": [[1, -100] * 8]}))


@on_dense("token ids for a decoder that takes several codes a token")
def _(model: Model, folder: Path) -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MusicgenConfig(
        text_encoder=T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4),
        audio_encoder=EncodecConfig(num_filters=4, hidden_size=32, codebook_dim=32, codebook_size=128),
        decoder=MusicgenDecoderConfig(**sizes, vocab_size=128, num_codebooks=4),
    )
    given(MusicgenForConditionalGeneration(config), token_ids())


on_dense("calibration data that are no data")(lambda model, _: given(model, [{1, 2, 3}]))


@on_dense("all splits of a data set")
def _(model: Model, folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    part = datasets.Dataset.from_dict({"text": ["some text"]})
    given(model, datasets.DatasetDict(train=part, test=part), tokenizer=byte_tokenizer())


@on_dense("weights that hold NaN")
def _(model: Model, folder: Path) -> None:
    broken = tiny_llama()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    convert(broken)


@on_dense("tau and sparsity both given")
def _(model: Model, folder: Path) -> None:
    PrunePathLM(pretrained=str(save_tiny_llama(folder)), tau=0.9, sparsity=0.5)


on_dense("a choice of feed-forward networks that are not there")(
    lambda model, _: convert(model, exclude="vision_tower")
)
on_dense("a choice that leaves nothing")(lambda model, _: convert(model, exclude="*"))
on_dense("a choice that is no name")(lambda model, _: convert(model, include=0))


@on_dense("a pruned layer asked for")
def _(model: Model, folder: Path) -> None:
    pruned = tiny_llama()
    prune.l1_unstructured(pruned.model.layers[0].mlp.up_proj, "weight", 0.3)
    convert(pruned, include="layers.0")


@on_dense("feed-forward networks with tied weights")
def _(model: Model, folder: Path) -> None:
    tied = tiny_llama()
    first, second = tied.model.layers
    for part in ("gate_proj", "up_proj", "down_proj"):
        getattr(second.mlp, part).weight = getattr(first.mlp, part).weight
    convert(tied)


@on_dense("a quantised base model")
def _(model: Model, folder: Path) -> None:
    quantised = tiny_llama()
    quantised.config.quantization_config = {"quant_method": "gptq"}
    convert(quantised)


@on_dense("a base model that was quantised in memory")
def _(model: Model, folder: Path) -> None:
    quantised = tiny_llama()
    quantised.is_quantized = True
    convert(quantised)


on_dense("a model on the meta device")(lambda model, _: convert(tiny_llama().to("meta")))


@on_dense("a model in DistributedDataParallel")
def _(model: Model, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        convert(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()


@on_dense("a model with LoRA")
def _(model: Model, folder: Path) -> None:
    convert(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))


@on_sparse("a sparse model in DataParallel")
def _(model: Model, folder: Path) -> None:
    next(iter(sparse_layers(model).values()))._replicate_for_data_parallel()  # what DataParallel calls on each module


@on_sparse("nothing run while recording")
def _(model: Model, folder: Path) -> None:
    with record_sparsity(model) as record:
        assert record.sparsity


def saved(model: Model, folder: Path) -> Path:
    copy.deepcopy(model).save_pretrained(folder / "saved")  # which notes its class in the config
    return folder / "saved"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data["quantization_config"])
    path.write_text(json.dumps(data))
    return folder


@on_sparse("routers of another configuration")
def _(model: Model, folder: Path) -> None:
    def larger(manifest: dict[str, Any]) -> None:
        manifest["shared"]["experts"]["expert_size"] = 16

    AutoModelForCausalLM.from_pretrained(edit(saved(model, folder), larger))


@on_sparse("a checkpoint without its routers")
def _(model: Model, folder: Path) -> None:
    file = saved(model, folder) / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if "router" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(folder / "saved")


@on_sparse("a checkpoint of a newer version")
def _(model: Model, folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(
        edit(saved(model, folder), lambda manifest: manifest.update(format_version=99))
    )


on_dense("a dense checkpoint given to load")(lambda model, folder: load(saved(model, folder)))


@on_sparse("a checkpoint that holds LTE's rule")
def _(model: Model, folder: Path) -> None:
    def threshold(manifest: dict[str, Any]) -> None:
        manifest["shared"]["selection"] = "threshold"

    AutoModelForCausalLM.from_pretrained(edit(saved(model, folder), threshold))


@on_dense("a model of a baseline saved")
def _(model: Model, folder: Path) -> None:
    lte(other := tiny_llama(), progress=False)
    other.save_pretrained(folder)


@on_sparse("a quantisation asked for while loading a sparse checkpoint")
def _(model: Model, folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(
        saved(model, folder), quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )


@on_sparse("a sparse model under tensor parallelism")
def _(model: Model, folder: Path) -> None:
    init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        whole = copy.deepcopy(model)
        up = whole.model.layers[0].mlp.up_proj
        up.weight = nn.Parameter(distribute_tensor(up.weight.detach(), init_device_mesh("cpu", (1,))))
        whole(input_ids=token_ids())
    finally:
        destroy_process_group()


on_sparse("a state dict's layers in a model that is sparse")(lambda model, _: rebuild(model, describe(model)))


@on_sparse("a sparse model under another quantisation saved")
def _(model: Model, folder: Path) -> None:
    whole = copy.deepcopy(model)
    whole.config.quantization_config = {"quant_method": "gptq"}
    whole.save_pretrained(folder)


@on_sparse("torchao's own quantize_ on a sparse model")
def _(model: Model, folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    whole = copy.deepcopy(model)
    quantization.quantize_(whole, quantization.Int8WeightOnlyConfig())
    whole(input_ids=token_ids())


@on_dense("densify under LoRA on the experts")
def _(model: Model, folder: Path) -> None:
    densify(get_peft_model(convert(tiny_llama()), LoraConfig(target_modules=["up_proj"])))


def adapter() -> PrunePathConfig:
    return PrunePathConfig(calibration=token_ids(), progress=False)


on_dense("densify of a PrunePath adapter")(lambda model, _: densify(get_peft_model(tiny_llama(), adapter())))
on_sparse("a PrunePath adapter on a sparse model")(lambda model, _: get_peft_model(model, adapter()))


@on_dense("no import before a PrunePath adapter is loaded")
def _(model: Model, folder: Path) -> None:
    get_peft_model(tiny_llama(), adapter()).save_pretrained(folder / "adapter")
    # As it is before the import.
    known = PEFT_TYPE_TO_CONFIG_MAPPING.pop("PRUNEPATH")
    try:
        PeftModel.from_pretrained(model, folder / "adapter")
    finally:
        PEFT_TYPE_TO_CONFIG_MAPPING["PRUNEPATH"] = known


@on_dense("reentrant gradient checkpointing in training")
def _(model: Model, folder: Path) -> None:
    other = convert(tiny_llama())
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    train(other, [{"input_ids": token_ids()}], TrainConfig(steps=1))


def test_every_row_is_provoked() -> None:
    assert list(rows()) and set(rows()) == set(MISTAKES)
    assert len(rows()) >= 20


def state(model: Model) -> list[Any]:
    tensors = [value.clone() for value in (*model.state_dict().values(), *model.buffers())]
    return [
        [type(module) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        model.config.to_dict(),
        tensors,
    ]


def same(found: list[Any], expected: list[Any]) -> bool:
    *facts, tensors = found
    *others, theirs = expected
    return facts == others and all(torch.equal(mine, its) for mine, its in zip(tensors, theirs, strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_message_is_the_documented_one(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_llama() if mistake in DENSE else convert(tiny_llama(), tau=0.5)
    before = state(model)
    with pytest.raises((ValueError, TypeError, KeyError, NotImplementedError, RuntimeError)) as caught:
        MISTAKES[mistake](model, tmp_path)
    pattern = ".*".join(re.escape(part) for part in rows()[mistake].split("…"))
    assert re.fullmatch(pattern, " ".join(str(caught.value).split())), caught.value
    assert same(state(model), before), "the model is as it was"
