"""Balanced k-means: clusters of exactly S rows each; the last one is smaller where N is no multiple of S.

There are three stages. *Carve* takes a random row and the rows nearest to it, again and again until none is left, so
groups that lie apart become clusters. *Lloyd* moves rows to the nearest mean that has room, those with most to lose
first.
*Swap* exchanges two rows of two clusters wherever that lowers the sum of squares, in many pairs of clusters at a time.
Lloyd compares a row with the mean of a cluster that includes the row itself, which keeps rows of small clusters in high
dimensions where they are; swap does not.

For speed, assignment is not optimal: that would be a transport problem in every round. No [N, N] matrix is made: the
largest are one copy of the rows and [N, E] scores.

Letters: N rows, D features, E clusters, S places a cluster, P pairs of clusters, K seeds at a time. ``slots_ES`` holds
row numbers; a place that the last cluster lacks, a *hole*, holds N, the number of an extra row of zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from torch_prunepath.config import num_experts

TOLERANCE = 5e-4
"""Share of the sum of squares: a round that lowers it by less is the last of its stage. A guess."""

MATCHINGS = 6
"""Number of sets of disjoint pairs of clusters that are tried on one table of scores. A guess."""

SEEDS = 64
"""Number of rows whose distances to all rows are computed together. A guess."""

BLOCK = 1 << 23
"""Numbers that are gathered at a time: larger blocks spend their time in page faults. No times are on record."""


def balanced_kmeans(features_ND: Tensor, expert_size: int, *, iterations: int = 20, seed: int = 0) -> Tensor:
    """Group rows so that the sum of squared distances to the group's mean is small.

    MoEfication (arXiv 2110.01786) builds experts by this objective. The module's text describes the three stages. The
    result is near a local optimum, and never worse than the given order of the rows.

    Args:
        features_ND: ``[N, D]``, any floating dtype; computed in float32 on its device.
        expert_size: rows of a cluster, S. If it is N or more, there is one cluster.
        iterations: largest number of rounds of Lloyd, and of rounds of swaps.
        seed: seed of the rows around which clusters are carved. The same seed gives the same result on the same machine
            with the same number of threads; elsewhere float32 sums may round differently.

    Returns:
        The order, int64 ``[N]`` on the CPU: ``order[i]`` is the row at place i. Cluster e holds places
        ``[e*S, (e+1)*S)``. Rows ascend within a cluster, and clusters ascend by their smallest row, except that a
        smaller cluster is always the last.

    Raises:
        ValueError: if the features are not a matrix of finite floating-point numbers, or a count is below 1.
    """
    features_ND = as_matrix("features", features_ND)
    if expert_size < 1:
        raise ValueError(f"expert_size={expert_size} must be at least 1")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    n = features_ND.shape[0]
    if 1 < expert_size < n:
        rows = _Rows.of(features_ND, expert_size)
        slots_ES = _swaps(rows, _start(rows, iterations, seed), iterations)
        order_N = slots_ES.flatten()[:n].cpu()
    else:
        order_N = torch.arange(n)
    return tidy(order_N, expert_size)


def tidy(order_N: Tensor, expert_size: int) -> Tensor:
    """Sort the rows within each cluster, and the clusters by their smallest row; a smaller cluster stays the last."""
    full = order_N.numel() // expert_size * expert_size
    slots_ES = order_N[:full].view(-1, expert_size).sort(dim=1).values
    slots_ES = slots_ES[slots_ES[:, :1].flatten().argsort()]
    return torch.cat([slots_ES.flatten(), order_N[full:].sort().values])


def sum_of_squares(features_ND: Tensor, order_N: Tensor, expert_size: int) -> float:
    """Compute the sum over rows of the squared distance to the mean of their cluster, in float64."""
    total = 0.0
    for ids in order_N.to(features_ND.device).split(expert_size):
        x_SD = features_ND[ids].double()
        total += float((x_SD - x_SD.mean(0)).square().sum())
    return total


def as_matrix(name: str, x: Tensor) -> Tensor:
    """Return ``x`` in float32, detached.

    Raises:
        ValueError: if ``x`` is not a matrix, is empty, or has numbers that are not floating point or not finite in
            float32.
    """
    if x.dim() != 2 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point matrix that is not empty, not {x.dtype} {list(x.shape)}")
    x = x.detach().float()
    if not all(map(math.isfinite, _bounds(x))):
        raise ValueError(f"{name} must be finite, but hold NaN or infinity: look for overflow in their computation")
    return x


def _bounds(x: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(x)
    return float(low), float(high)


@dataclass(frozen=True)
class _Rows:
    """The rows that are clustered, and the size of each cluster; ``square_N`` are squared norms."""

    x_ND: Tensor  # N + 1 rows: the last is zeros, what holes hold
    square_N: Tensor
    size_E: Tensor
    expert_size: int

    @classmethod
    def of(cls, features_ND: Tensor, expert_size: int) -> Self:
        """Scale and centre the features, which leaves the best clusters as they are and keeps float32 precise."""
        n, dim = features_ND.shape
        low, high = _bounds(features_ND)
        exponent = math.frexp(max(-low, high))[1]  # scaling by a power of two does not round
        x_ND = torch.zeros(n + 1, dim, device=features_ND.device)
        torch.mul(features_ND, 2.0 ** max(-120, min(120, -exponent)), out=x_ND[:n])
        x_ND[:n] -= x_ND[:n].mean(0)
        square_N = torch.linalg.vecdot(x_ND, x_ND)
        size_E = torch.full((num_experts(n, expert_size),), expert_size, device=x_ND.device)
        size_E[-1] = n - expert_size * (len(size_E) - 1)
        return cls(x_ND, square_N, size_E, expert_size)

    @property
    def count(self) -> int:
        return self.x_ND.shape[0] - 1

    def blocks(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Split ``slots [*, S]`` into blocks of rows whose gathered features are at most ``BLOCK`` numbers."""
        return slots.split(max(1, BLOCK // (slots.shape[1] * self.x_ND.shape[1])))

    def means(self, slots_ES: Tensor) -> Tensor:
        """Compute the mean of every cluster, ``[E, D]``."""
        sums_ED = torch.cat([self.x_ND[block].sum(1) for block in self.blocks(slots_ES)])
        return sums_ED / self.size_E[:, None]

    def within(self, means_ED: Tensor) -> float:
        """Compute the sum of squared distances to the clusters' means."""
        between_E = torch.linalg.vecdot(means_ED, means_ED).double() * self.size_E
        return float(self.square_N.double().sum() - between_E.sum())


def _start(rows: _Rows, iterations: int, seed: int) -> Tensor:
    """Return clusters ``[E, S]`` for swaps to improve: carved and moved by Lloyd, or the given order if better."""
    found_ES = _lloyd(rows, _carve(rows, seed), iterations)
    given_ES = torch.arange(found_ES.numel(), device=found_ES.device).clamp_(max=rows.count).view_as(found_ES)
    better = rows.within(rows.means(found_ES)) <= rows.within(rows.means(given_ES))
    return found_ES if better else given_ES


# --- carve ------------------------------------------------------------------------------------------------------------


def _carve(rows: _Rows, seed: int) -> Tensor:
    """Carve clusters ``[E, S]``: each is a random free row and the free rows nearest to it."""
    n, device = rows.count, rows.x_ND.device
    queue_N = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    free_N = torch.ones(n, dtype=torch.bool, device=device)
    sizes = rows.size_E.tolist()
    slots_ES = torch.full((len(sizes), rows.expert_size), n, device=device)
    made = 0
    while made < len(sizes):
        seeds_K = queue_N[free_N[queue_N]][:SEEDS]
        # Squared distances, up to a constant a seed.
        near_KN = torch.addmm(rows.square_N[:n], rows.x_ND[seeds_K], rows.x_ND[:n].T, alpha=-2)
        for row, near_N in zip(seeds_K.tolist(), near_KN, strict=True):
            if made == len(sizes) or not free_N[row]:
                continue
            near_N.masked_fill_(~free_N, math.inf)
            taken = near_N.topk(sizes[made], largest=False).indices
            slots_ES[made, : sizes[made]] = taken
            free_N[taken] = False
            made += 1
    return slots_ES


# --- Lloyd ------------------------------------------------------------------------------------------------------------


def _lloyd(rows: _Rows, slots_ES: Tensor, iterations: int) -> Tensor:
    """Repeat rounds of assigning every row to a near mean with room, while that lowers the sum of squares."""
    means_ED = rows.means(slots_ES)
    within = rows.within(means_ED)
    for _ in range(iterations):
        moved_ES = _reassign(rows, slots_ES, means_ED)
        means_ED = rows.means(moved_ES)
        before, within = within, rows.within(means_ED)
        if within < before:
            slots_ES = moved_ES
        if within >= before * (1 - TOLERANCE):
            break
    return slots_ES


def _reassign(rows: _Rows, slots_ES: Tensor, means_ED: Tensor) -> Tensor:
    """Do one round of balanced assignment, and return the new clusters."""
    n, size = rows.count, rows.expert_size
    score_NE = torch.addmm(torch.linalg.vecdot(means_ED, means_ED), rows.x_ND[:n], means_ED.T, beta=-1, alpha=2)
    taken = slots_ES < n
    # A row among equals stays where it is: otherwise equal means would fill up one after the other.
    stay = torch.arange(len(slots_ES), device=slots_ES.device)[:, None].expand_as(slots_ES)
    score_NE[slots_ES[taken], stay[taken]] += 1e-6 * rows.square_N.mean()
    if int(rows.size_E[-1]) < size:
        # Which cluster is the small one is free as well: let each take S rows, and make the emptiest the last.
        label_N = _assign(score_NE, torch.full_like(rows.size_E, size))
        least = int(torch.bincount(label_N, minlength=len(means_ED)).argmin())
        score_NE[:, [least, -1]] = score_NE[:, [-1, least]]
    label_N = _assign(score_NE, rows.size_E)
    order_N = label_N.argsort(stable=True)
    return torch.cat([order_N, order_N.new_full((slots_ES.numel() - n,), n)]).view_as(slots_ES)


def _assign(score_NE: Tensor, room_E: Tensor) -> Tensor:
    """Assign every row to its best cluster with room; rows that would lose most by their second best come first.

    Returns:
        The cluster of each row, int64 ``[N]``.
    """
    label_N = torch.full((len(score_NE),), -1, device=score_NE.device)
    waiting, room_E = torch.arange(len(score_NE), device=score_NE.device), room_E.clone()
    while len(waiting):
        best, cluster = score_NE.topk(2, dim=1)
        wish, regret = cluster[:, 0], best[:, 0] - best[:, 1]
        turn = regret.argsort(descending=True, stable=True)
        turn = turn[wish[turn].argsort(stable=True)]
        wishes_E = torch.bincount(wish, minlength=len(room_E))
        first_E = wishes_E.cumsum(0) - wishes_E
        rank = torch.arange(len(turn), device=turn.device) - first_E[wish[turn]]
        accepted = torch.zeros_like(turn, dtype=torch.bool)
        accepted[turn] = rank < room_E[wish[turn]]
        assert accepted.any(), "finite scores always find room"
        label_N[waiting[accepted]] = wish[accepted]
        room_E -= torch.bincount(wish[accepted], minlength=len(room_E))
        waiting, score_NE = waiting[~accepted], score_NE[~accepted]
        score_NE[:, room_E == 0] = -math.inf
    return label_N


# --- swaps ------------------------------------------------------------------------------------------------------------


def _swaps(rows: _Rows, slots_ES: Tensor, iterations: int) -> Tensor:
    """Exchange rows between pairs of clusters while that lowers the sum of squares."""
    slots_ES = slots_ES.clone()
    for _ in range(iterations):
        within = rows.within(means_ED := rows.means(slots_ES))
        promise_EE = _promise(rows, slots_ES, means_ED)
        gain = 0.0
        for _ in range(MATCHINGS):
            a_P, b_P = _matching(promise_EE)
            gain += _swap_within(rows, slots_ES, a_P, b_P)
            promise_EE[a_P, b_P] = promise_EE[b_P, a_P] = -math.inf
        if gain <= TOLERANCE * within:
            break
    return slots_ES


def _promise(rows: _Rows, slots_ES: Tensor, means_ED: Tensor) -> Tensor:
    """Estimate the gain of a swap between two clusters, ``[E, E]``.

    It is the largest gain by the formula of :func:`_swap_within` without the term that depends on both rows.
    """
    inverse_E = 1 / rows.size_E
    clusters = torch.arange(len(slots_ES), device=slots_ES.device)
    parts = []
    for ids_BS, own_B in zip(rows.blocks(slots_ES), clusters.split(len(rows.blocks(slots_ES)[0])), strict=True):
        pull_BSE = 2 * (rows.x_ND[ids_BS] @ means_ED.T)
        pull_BSE -= pull_BSE.gather(2, own_B[:, None, None].expand(*ids_BS.shape, 1))
        pull_BSE += rows.square_N[ids_BS][..., None] * (inverse_E[own_B][:, None, None] + inverse_E)
        pull_BSE.masked_fill_((ids_BS == rows.count)[..., None], -math.inf)
        parts.append(pull_BSE.amax(1))
    leave_EE = torch.cat(parts)
    return (leave_EE + leave_EE.T).fill_diagonal_(-math.inf)


def _matching(promise_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Choose disjoint pairs of clusters, int64 ``[P]`` each: round by round, those that are best for one another."""
    promise_EE = promise_EE.clone()
    every_E = torch.arange(len(promise_EE), device=promise_EE.device)
    found: list[Tensor] = []
    while True:
        best_E, partner_E = promise_EE.max(1)
        mutual_E = (best_E > -math.inf) & (partner_E[partner_E] == every_E) & (every_E < partner_E)
        pairs_2P = torch.stack([every_E[mutual_E], partner_E[mutual_E]])
        found.append(pairs_2P)
        if not pairs_2P.numel():
            a_P, b_P = torch.cat(found, dim=1)
            return a_P, b_P
        promise_EE[pairs_2P.flatten()] = -math.inf
        promise_EE[:, pairs_2P.flatten()] = -math.inf


def _swap_within(rows: _Rows, slots_ES: Tensor, a_P: Tensor, b_P: Tensor) -> float:
    """Swap rows of clusters a and b in place, the best swap first, and return by how much the sum of squares fell.

    With means m, sizes n and w = 1/n_a + 1/n_b, swapping row i of a and row j of b lowers the sum of squares by
    2 (x_j - x_i) . (m_a - m_b) + w |x_j - x_i|^2.
    """
    if not len(a_P):
        return 0.0
    size = rows.expert_size
    ids_PS = torch.cat([slots_ES[a_P], slots_ES[b_P]], dim=1)  # 2S rows a pair, a's first
    gram_PSS = torch.cat([y @ y.mT for y in (rows.x_ND[block] for block in rows.blocks(ids_PS))])
    inverse_PE = 1 / rows.size_E[torch.stack([a_P, b_P], dim=1)]
    w_P = inverse_PE.sum(1)
    share_PS = (inverse_PE * inverse_PE.new_tensor([1, -1])).repeat_interleave(size, dim=1)
    pull_PS = 2 * (gram_PSS @ share_PS[..., None]).squeeze(-1)  # 2 x . (m_a - m_b)
    own_PS = w_P[:, None] * rows.square_N[ids_PS]
    own_PS.masked_fill_(ids_PS == rows.count, -math.inf)
    at_PS = torch.arange(2 * size, device=ids_PS.device).expand_as(ids_PS).clone()  # who sits where
    least = 1e-6 * float(rows.square_N.mean())
    live, total = torch.arange(len(a_P), device=ids_PS.device), 0.0
    for _ in range(size):
        i, j = at_PS[live, :size], at_PS[live, size:]
        pull, own = pull_PS[live], own_PS[live]
        cross = gram_PSS[live[:, None, None], i[:, :, None], j[:, None, :]]
        gain = cross * (-2 * w_P[live, None, None])
        gain += (own - pull).gather(1, i)[:, :, None] + (own + pull).gather(1, j)[:, None, :]
        best, where = gain.flatten(1).max(1)
        better = best > least
        live, best, where = live[better], best[better], where[better]
        if not len(live):
            break
        total += float(best.double().sum())
        at_i, at_j = where // size, where % size + size
        row_i, row_j = at_PS[live, at_i], at_PS[live, at_j]
        at_PS[live, at_i], at_PS[live, at_j] = row_j, row_i
        pull_PS[live] += 2 * w_P[live, None] * (gram_PSS[live, row_j] - gram_PSS[live, row_i])
    moved_PS = ids_PS.gather(1, at_PS)
    slots_ES[a_P], slots_ES[b_P] = moved_PS[:, :size], moved_PS[:, size:]
    return total
