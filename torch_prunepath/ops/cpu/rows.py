"""Rows of active experts, read where they lie: what few tokens need on a CPU, and when it pays.

Two gathers of ATen do the work, both made for embedding tables. ``_embedding_bag_per_sample_weights_backward`` is the
dot product of a token with each listed row (gate, up, router), ``_embedding_bag_forward_only`` a weighted sum of listed
rows (down). They read rows where they lie, sum in float32 or wider, and use all threads.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons (the last may be smaller), K active experts, P pairs
of a token and a neuron that is active for it, B bags: runs of one token's pairs that are summed together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from torch_prunepath.activations import activate
from torch_prunepath.select import keep_counted
from torch_prunepath.weights import Threshold, UpWeights

FEW_TOKENS = 16
"""Calls of more tokens are always dense: where gathering breaks even was measured up to here."""

SMALL_BYTES = 512 << 10
"""Size of a projection below which a dense product is done before rows are even listed; and of rows below which their
sum is not worth a second thread. Both were found by hand on the machine of docs/log.md, "few tokens on a CPU"."""

LARGE_BYTES = 8 << 20
"""Size of a projection from which on finding the pairs costs little beside reading their rows; found likewise."""

CACHED_BYTES = 2 << 20
"""Bytes of rows that are cheap to read a second time, for the next token. A guess at common sizes of a core's cache."""

# Gathering is chosen for at most so many pairs of a token and a neuron, as multiples of the number of rows. On 2 cores
# of an AMD EPYC with AVX-512, `benchmarks/cpu_rows.py --parts projections` shows where it breaks even: numbers that are
# called fitted were fitted to that, at 1 to 16 tokens and 576 to 3584 columns; how others were found was not recorded.

DOTS_16_BITS = 1.8
"""Limit on dot products with very long 16-bit rows; fitted. Each costs what a dense product takes for 1 / 1.8 rows."""

DOT_START_BYTES = 2200
"""Cost of starting a dot product, as so many bytes of a 16-bit row; fitted. It makes short rows pay for fewer pairs."""

DOTS_ONE_TOKEN = 2.0
"""How much more often dot products of a single token pay in 16 bits, fitted: its pairs need no order among tokens."""

DOTS_PACKED = 0.45
"""How much less often they pay where the dense product would read a copy in oneDNN's order, in about half the time."""

DOTS_32_BITS, DOTS_32_BITS_LARGE = 2.0, 3.0
"""Limits on dot products with float32 rows of small and of large projections: MKL's products of few tokens are slow."""

SUMS_16_BITS, SUMS_32_BITS = 1.0, 2.0
"""Limits on sums of rows of small projections."""

SUMS_LARGE = 4.0
"""Limit on sums of rows of large projections: in 16 bits, a dense product first copies what is laid out by rows, which
takes longer than the product itself (docs/log.md, "few tokens on a CPU")."""

SUMS_PACKED, SUMS_PACKED_LARGE = 0.4, 0.6
"""Limits on sums of rows where the dense product would read a copy in oneDNN's order."""

PAIRS_64_BITS = 0.5
"""Limit on dot products and sums in float64, whose dense products are as good as float32's; a guess."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of a token and a neuron that is active for it: the work of a call of few tokens.

    Attributes:
        rows_P: int64, the neuron of each pair.
        tokens_P: int64, its token.
        starts_B: int64, the first pair of each bag; bag b belongs to token ``b % tokens``.
        tokens: T.
    """

    rows_P: Tensor
    tokens_P: Tensor
    starts_B: Tensor
    tokens: int


# --- what pays --------------------------------------------------------------------------------------------------------


def dots_pay(pairs: int, tokens: int, rows_FD: Tensor, packed: bool = False) -> bool:
    """Whether :func:`dot_rows` of P pairs is expected to be faster than a dense product of T tokens with all rows.

    A dense product reads every row once, whatever T; a gathered one pays for every pair.

    Args:
        pairs: P, summed over tokens.
        tokens: T.
        rows_FD: gate, up or fc1 rows ``[F, D]``.
        packed: whether the dense product would read a copy in oneDNN's order (:mod:`torch_prunepath.ops.cpu.packs`).
    """
    if not _gatherable(tokens, rows_FD):
        return False
    if rows_FD.element_size() > 4:
        share = PAIRS_64_BITS
    elif rows_FD.element_size() == 4:
        share = DOTS_32_BITS_LARGE if rows_FD.nbytes >= LARGE_BYTES else DOTS_32_BITS
    else:
        row_bytes = 2 * rows_FD.shape[1]
        share = DOTS_16_BITS * row_bytes / (row_bytes + DOT_START_BYTES)
        share *= DOTS_ONE_TOKEN if tokens == 1 else DOTS_PACKED if packed else 1
    return pairs <= share * rows_FD.shape[0]


def sums_pay(pairs: int, tokens: int, rows_FD: Tensor, packed: bool = False) -> bool:
    """Whether :func:`sum_rows` of P pairs is expected to be faster than a dense product; arguments as :func:`dots_pay`.

    ``rows_FD`` are down rows ``[F, D]``. Their sums pay longer than dot products.
    """
    if not _gatherable(tokens, rows_FD):
        return False
    large = rows_FD.nbytes >= LARGE_BYTES
    if rows_FD.element_size() > 4:
        share = PAIRS_64_BITS
    elif packed:
        share = SUMS_PACKED_LARGE if large else SUMS_PACKED
    elif large:
        share = SUMS_LARGE
    else:
        share = SUMS_16_BITS if rows_FD.element_size() == 2 else SUMS_32_BITS
    return pairs <= share * rows_FD.shape[0]


def _gatherable(tokens: int, rows_FD: Tensor) -> bool:
    return 1 <= tokens <= FEW_TOKENS and rows_FD.stride(1) == 1 and rows_FD.nbytes >= SMALL_BYTES


# --- pairs ------------------------------------------------------------------------------------------------------------


def find_pairs(mask_TE: Tensor, expert_size: int, rows_FD: Tensor) -> Pairs:
    """The pairs that a mask of at least one token makes active, in an order that suits rows like these."""
    on_TF = mask_TE.repeat_interleave(expert_size, dim=1)[:, : len(rows_FD)]
    row_bytes = rows_FD.shape[1] * rows_FD.element_size()
    if len(on_TF) == 1:
        return _pairs_of_one(on_TF[0].nonzero().squeeze(1), row_bytes)
    return _pairs_of_some(on_TF, row_bytes)


def pairs_of_experts(experts_K: Tensor, expert_size: int, rows_FD: Tensor) -> Pairs:
    """The pairs of one token, from the list of its active experts."""
    ffn_size = len(rows_FD)
    rows_P = torch.add(torch.arange(expert_size), experts_K.unsqueeze(1), alpha=expert_size).view(-1)
    if ffn_size % expert_size:
        rows_P = rows_P[rows_P < ffn_size]
    return _pairs_of_one(rows_P, rows_FD.shape[1] * rows_FD.element_size())


def _pairs_of_one(rows_P: Tensor, row_bytes: int) -> Pairs:
    """One token: a bag for each thread, of equal lengths, or a single one where threads gain little."""
    zeros_P = torch.zeros_like(rows_P)
    if len(rows_P) * row_bytes < SMALL_BYTES:
        return Pairs(rows_P, zeros_P, torch.zeros(1, dtype=torch.int64), 1)
    bags = torch.get_num_threads()
    return Pairs(rows_P, zeros_P, torch.arange(bags) * (len(rows_P) // bags), 1)


def _pairs_of_some(on_TF: Tensor, row_bytes: int) -> Pairs:
    """Block of rows by block of rows, then token by token: the second token finds its rows in the cache."""
    tokens, ffn_size = on_TF.shape
    blocks = max(-(-ffn_size * row_bytes // CACHED_BYTES), -(-torch.get_num_threads() // tokens))
    size = -(-ffn_size // blocks)
    blocks = -(-ffn_size // size)
    on_BTR = nnf.pad(on_TF, (0, blocks * size - ffn_size)).view(tokens, blocks, size).transpose(0, 1).contiguous()
    block_P, token_P, row_P = on_BTR.nonzero().unbind(1)
    lengths_B = on_BTR.sum(2).flatten()
    return Pairs(row_P.add(block_P, alpha=size), token_P.contiguous(), lengths_B.cumsum(0) - lengths_B, tokens)


# --- rows -------------------------------------------------------------------------------------------------------------


def dot_rows(x_TD: Tensor, pairs: Pairs, rows_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """Dot product ``x[t] . rows[f] + bias[f]`` of every pair: ``[P]``."""
    gather = torch.ops.aten._embedding_bag_per_sample_weights_backward
    dots_P = gather(x_TD, rows_FD, pairs.rows_P, pairs.starts_B, pairs.tokens_P, 0)
    return dots_P if bias_F is None else dots_P.add_(bias_F[pairs.rows_P])  # type: ignore[no-any-return]


def sum_rows(h_P: Tensor, pairs: Pairs, rows_FD: Tensor, bias_D: Tensor | None) -> Tensor:
    """Every token's sum of ``h[p] * rows[f]`` over its pairs, plus the bias: ``[T, D]``."""
    gather = torch.ops.aten._embedding_bag_forward_only
    bags_BD = gather(rows_FD, pairs.rows_P, pairs.starts_B, False, 0, False, h_P)[0]
    if len(bags_BD) == pairs.tokens and bias_D is None:
        return bags_BD  # type: ignore[no-any-return]
    wide = torch.promote_types(h_P.dtype, torch.float32)
    y_TD = bags_BD.view(-1, pairs.tokens, bags_BD.shape[1]).sum(0, dtype=wide)
    return (y_TD if bias_D is None else y_TD.add_(bias_D)).to(h_P.dtype)


def hidden_of_pairs(x_TD: Tensor, pairs: Pairs, weights: UpWeights, activation: str) -> Tensor:
    """Hidden activation of every pair: ``[P]``."""
    up_P = dot_rows(x_TD, pairs, weights.up_FD, weights.up_bias_F)
    gate_P = None if weights.gate_FD is None else dot_rows(x_TD, pairs, weights.gate_FD, weights.gate_bias_F)
    return activate(up_P, gate_P, activation, reuse=True)


def take_pairs(h_TF: Tensor, pairs: Pairs) -> Tensor:
    """The hidden activations of the pairs: ``[T, F] -> [P]``."""
    return h_TF[pairs.tokens_P, pairs.rows_P]


def spread_pairs(h_P: Tensor, pairs: Pairs, ffn_size: int) -> Tensor:
    """Inverse of :func:`take_pairs`, 0 elsewhere: ``[P] -> [T, F]``."""
    places_P = pairs.rows_P.add(pairs.tokens_P, alpha=ffn_size)
    return h_P.new_zeros(pairs.tokens * ffn_size).index_copy_(0, places_P, h_P).view(pairs.tokens, ffn_size)


def keep_counted_pairs(h_P: Tensor, pairs: Pairs, neurons: Threshold | None) -> Tensor:
    """The hidden activations with 0 in the place of those under the neurons' threshold: ``[P]``."""
    if neurons is None:
        return h_P
    return keep_counted(h_P, Threshold(neurons.theta, neurons.norm_N[pairs.rows_P]))


def weigh_pairs_(h_P: Tensor, pairs: Pairs, weights_TE: Tensor | None, expert_size: int) -> Tensor:
    """Multiplies every pair by its expert's weight, None being 1, in place."""
    if weights_TE is None:
        return h_P
    return h_P.mul_(weights_TE.to(h_P.dtype)[pairs.tokens_P, pairs.rows_P // expert_size])
