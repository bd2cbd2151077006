"""What the decoder of an encoder-decoder is given where the caller gives token ids only, and rows that go together.

Shapes: B rows, T tokens, C codes a token.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torch_prunepath
from torch_prunepath import SparsifyConfig
from torch_prunepath.inputs.data import as_inputs, iterate_inputs, rows_together
from torch_prunepath.inputs.rows import small_part, spread

IDS = torch.randint(3, 90, (6, 12), generator=torch.Generator().manual_seed(0))
CODES = 4
BART = {"layers": 2, "ffn_dim": 64, "attention_heads": 4}


def musicgen() -> nn.Module:
    """A decoder that takes a row for each code: ids ``[B * C, T]``."""
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    config = transformers.MusicgenDecoderConfig(**sizes, num_codebooks=CODES, max_position_embeddings=64)
    torch.manual_seed(0)
    return transformers.MusicgenForCausalLM(config).eval()


def dia() -> nn.Module:
    """An encoder-decoder whose decoder takes ids ``[B, T, C]``, and makes its first ones itself."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 64}
    cross = {"cross_num_attention_heads": 4, "cross_head_dim": 8, "cross_num_key_value_heads": 2}
    decoder = {**sizes, **cross, "cross_hidden_size": 32, "num_channels": CODES}
    tokens = {"bos_token_id": 100, "eos_token_id": 101, "pad_token_id": 102}
    torch.manual_seed(0)
    config = transformers.DiaConfig(encoder_config=sizes, decoder_config=decoder, delay_pattern=[0] * CODES, **tokens)
    return transformers.DiaModel(config).eval()


def bart() -> nn.Module:
    """An encoder-decoder that makes decoder ids itself where none are given, and runs with the ids as well."""
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in BART.items()}
    config = transformers.BartConfig(vocab_size=128, d_model=32, max_position_embeddings=64, **sizes)
    return transformers.BartModel(config).eval()


class Picky(nn.Module):
    """An encoder-decoder that runs with the ids as decoder ids, without decoder ids, or with neither."""

    class config:
        is_encoder_decoder = True
        vocab_size = 100

    def __init__(self, copied: bool, alone: bool) -> None:
        super().__init__()
        self.copied, self.alone = copied, alone
        self.table = nn.Embedding(100, 4)

    def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor | None = None) -> torch.Tensor:
        if decoder_input_ids is None and not self.alone:
            raise ValueError("decoder ids are missing")
        if decoder_input_ids is not None and not self.copied:
            raise RuntimeError("decoder ids are of a wrong shape")
        assert not self.training and not torch.is_grad_enabled()
        return self.table(input_ids) + torch.rand(())


@pytest.mark.parametrize(("copied", "alone"), [(True, True), (True, False), (False, True)])
def test_the_decoder_gets_the_ids_where_it_takes_them(copied: bool, alone: bool) -> None:
    model = Picky(copied, alone).train()
    state = torch.random.get_rng_state()
    for inputs in (as_inputs(IDS, model), *iterate_inputs(IDS, model)):
        assert ("decoder_input_ids" in inputs) == copied
        assert not copied or torch.equal(inputs["decoder_input_ids"], IDS)
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_where_the_model_runs_with_neither_both_errors_are_told() -> None:
    with pytest.raises(ValueError, match=r"of a wrong shape.* are missing.*pass decoder_input_ids") as error:
        as_inputs(IDS, Picky(False, False))
    assert isinstance(error.value.__cause__, RuntimeError)
    given_ids = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert as_inputs(given_ids, Picky(False, False)).keys() == given_ids.keys()


@pytest.mark.parametrize("name", ["t5_gated", "bart"])
def test_decoders_of_text_get_the_ids_of_every_row(name: str) -> None:
    model = bart() if name == "bart" else ARCHITECTURES[name]()[0]
    inputs = as_inputs(IDS, model, tokens=30)
    assert torch.equal(inputs["input_ids"], IDS[[0, 5]])
    assert torch.equal(inputs["decoder_input_ids"], IDS[[0, 5]])


def test_a_decoder_that_makes_its_first_codes_is_converted() -> None:
    model = dia()
    dense = model(input_ids=IDS).last_hidden_state
    assert as_inputs(IDS, model).keys() == {"input_ids"}
    torch_prunepath.sparsify(model, calibration=IDS, tau=1.0, progress=False)
    assert len(torch_prunepath.sparse_layers(model)) == 4
    assert torch.allclose(model(input_ids=IDS).last_hidden_state, dense, atol=1e-5)


def test_rows_of_codes_stay_together() -> None:
    model = musicgen()
    ids = IDS.repeat(4, 1)  # six rows of four codes
    assert rows_together({"input_ids": ids}, model) == CODES
    kept = as_inputs(ids, model, tokens=2 * CODES * ids.shape[1])["input_ids"]
    assert torch.equal(kept, torch.cat([ids[:CODES], ids[-CODES:]]))
    dense = model(input_ids=ids).logits
    torch_prunepath.sparsify(model, calibration=ids, tau=1.0, progress=False)
    assert torch.allclose(model(input_ids=ids).logits, dense, atol=1e-5)
    assert torch_prunepath.sparse_layers(model)


def test_one_row_is_enough_for_other_models() -> None:
    model, inputs = ARCHITECTURES["llama"]()
    assert rows_together(inputs, model) == 1
    assert small_part({"input_ids": IDS})["input_ids"].shape == (1, 8)
    assert rows_together({"input_ids": IDS}, Picky(False, False)) == 1  # it tells why where it is run


class Listening(nn.Module):
    """An FFN that reads the tokens of sound only, whose ids are 90 and above, and one that reads all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 16)
        self.sound, self.text = (nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        is_sound = input_ids >= 90
        x = x.masked_scatter(is_sound[..., None], self.sound(x[is_sound]))
        return self.text(x)


def test_an_ffn_that_is_called_with_no_token_is_not_reached() -> None:
    model = Listening().eval()
    with pytest.raises(ValueError, match=r"does not reach 1 of 2 FFNs \(the first: sound\).*exclude='sound'"):
        torch_prunepath.sparsify(model, calibration=IDS, config=SparsifyConfig(expert_size=8), progress=False)
    with pytest.raises(ValueError, match="holds no sparse FFN"):
        torch_prunepath.sparse_layers(model)
    torch_prunepath.sparsify(model, calibration=IDS + 5, config=SparsifyConfig(expert_size=8), progress=False)
    assert len(torch_prunepath.sparse_layers(model)) == 2


def test_a_backbone_whose_first_output_is_a_tuple_is_converted() -> None:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, image_size=32)
    model = transformers.ConvNextBackbone(config).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (dense,) = model(pixels).feature_maps
    torch_prunepath.sparsify(model, calibration={"pixel_values": pixels}, tau=1.0, progress=False)
    assert len(torch_prunepath.sparse_layers(model)) == 4
    assert torch.allclose(model(pixels).feature_maps[0], dense, atol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_whole_groups_are_spread_over_the_rows(groups: int, wanted: int, together: int) -> None:
    count = groups * together
    rows = spread(count, min(wanted, count), together)
    assert len(rows) % together == 0 and len(rows) <= max(together, wanted) and rows[0] == 0
    first = rows[::together]
    assert torch.equal(rows, (first[:, None] + torch.arange(together)).flatten())
    assert (first % together == 0).all() and (first.diff() > 0).all() and rows[-1] < count
    if together == 1:
        assert torch.equal(rows, torch.linspace(0, count - 1, min(wanted, count)).round().long())
