"""Counts of routes by expert, skill and token, and the lift, clusters and information they give.

Routers depend on the token more than on anything else. So all figures compare within a token: an
expert that serves a skill is chosen more often for it than for other skills *at the same token*.
Where the skill says nothing beyond the token, the lift is 1 and the information 0.

Shapes: T positions, L layers, k experts chosen at a position, E experts, S skills, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mm.errors import RLError


@dataclass(frozen=True)
class RouteCounts:
    """Counts of (layer, expert, skill, token), without those that are 0. `cells` and `counts` are
    int64 of one length; `+` merges the counts of probes and ranks."""

    sizes: tuple[int, int, int, int]  # L, E, S, V
    cells: torch.Tensor  # ascending indices into [L, E, S, V]
    counts: torch.Tensor

    def __add__(self, other: RouteCounts) -> RouteCounts:
        if other.sizes != self.sizes:
            raise RLError(
                f"route counts of sizes {self.sizes} and {other.sizes} (layers, experts, skills, "
                "tokens) cannot be added; count both for one model and one list of skills"
            )
        cells = torch.cat((self.cells, other.cells))
        cells, where = cells.unique(return_inverse=True)
        counts = torch.zeros(len(cells), dtype=torch.int64)
        counts.index_add_(0, where, torch.cat((self.counts, other.counts)))
        return RouteCounts(self.sizes, cells, counts)

    def layer(self, layer: int) -> torch.Tensor:
        """Returns fp64 [E, S, V'] of one layer, with the V' tokens that occur."""
        _, experts, skills, tokens = self.sizes
        span = experts * skills * tokens
        here = (self.cells >= layer * span) & (self.cells < (layer + 1) * span)
        cells, counts = self.cells[here] - layer * span, self.counts[here]
        seen, column = (cells % tokens).unique(return_inverse=True)
        dense = torch.zeros(experts * skills, len(seen), dtype=torch.float64)
        dense[cells // tokens, column] = counts.double()
        return dense.view(experts, skills, len(seen))


def count_routes(
    routes_TLk: torch.Tensor,
    skill_T: torch.Tensor,
    token_T: torch.Tensor,
    num_experts: int,
    num_skills: int,
    vocab_size: int,
) -> RouteCounts:
    """Counts the routes of labelled positions.

    Args:
        routes_TLk: int16, experts.
        skill_T: -1 is left out.
        token_T: the token that stands at the position (what the router saw, not what was sampled).
    Raises:
        RLError: for an expert, skill or token beyond its number, which would be counted as another.
    """
    layers = routes_TLk.shape[1]
    here = skill_T >= 0
    routes_TLk, skill_T, token_T = routes_TLk[here].long(), skill_T[here], token_T[here]
    for what, values, size in (
        ("expert", routes_TLk, num_experts),
        ("skill", skill_T, num_skills),
        ("token", token_T, vocab_size),
    ):
        odd = values[(values < 0) | (values >= size)]
        if len(odd):
            raise RLError(
                f"{len(odd)} routes name {what} {int(odd[0])}, there are 0 to {size - 1}; "
                "count only what was recorded, with the sizes of its model"
            )
    layer_L1 = torch.arange(layers).unsqueeze(1)
    cells = layer_L1 * num_experts + routes_TLk
    cells = cells * num_skills + skill_T[:, None, None]
    cells = cells * vocab_size + token_T[:, None, None]
    cells, counts = cells.flatten().unique(return_counts=True)
    return RouteCounts((layers, num_experts, num_skills, vocab_size), cells, counts)


def lift(counts_ESV: torch.Tensor, prior: float = 5.0) -> torch.Tensor:
    """Returns [E, S]: how often an expert is chosen for a skill, over how often its rate at the
    same tokens lets one expect. `prior` choices are added to both, so that rare ones stay near 1.

    The expected count is the sum over v of n(e, v) n(s, v) / n(v): expert and skill independent
    given the token (the pooling of Mantel and Haenszel). For the lift without regard to the token,
    sum the counts over V first and keep the dimension.
    """
    chosen_EV, skill_SV = counts_ESV.sum(1), counts_ESV.sum(0)
    total_V = skill_SV.sum(0).clamp(min=1)
    expected_ES = chosen_EV @ (skill_SV / total_V).T
    return (counts_ESV.sum(2) + prior) / (expected_ES + prior)


def lifts(counts: RouteCounts, given_token: bool = True, prior: float = 5.0) -> torch.Tensor:
    """Returns fp64 [L, E, S]: the `lift` of every layer."""
    found = []
    for layer in range(counts.sizes[0]):
        counts_ESV = counts.layer(layer)
        found.append(lift(counts_ESV if given_token else counts_ESV.sum(2, keepdim=True), prior))
    return torch.stack(found)


def choose_clusters(
    lift_LES: torch.Tensor, size: int, min_lift: float = 1.1
) -> list[list[list[int]]]:
    """Returns the experts with the highest lift, for each skill and layer at most `size` and none
    below `min_lift`, as `SkillMap.skills` has them, in order of skill ids. Skills may share an
    expert."""
    clusters = []
    for lift_LE in lift_LES.permute(2, 0, 1):
        best = lift_LE.topk(min(size, lift_LE.shape[1]), dim=1)
        clusters.append(
            [
                sorted(e for e, x in zip(experts, values, strict=True) if x >= min_lift)
                for experts, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
    return clusters


def mutual_information(counts_ESV: torch.Tensor) -> tuple[float, float]:
    """Returns I(expert; skill | token) of one layer in nats, and the part that chance alone lets
    one expect: the sum over v of (E_v - 1)(S_v - 1) / 2n with the experts and skills seen at v
    (Miller-Madow), which is right for many counts only."""
    n = counts_ESV.sum()
    if n == 0:
        return 0.0, 0.0
    chosen_E1V, skill_1SV = counts_ESV.sum(1, keepdim=True), counts_ESV.sum(0, keepdim=True)
    total_V = counts_ESV.sum((0, 1))
    ratio_ESV = counts_ESV * total_V / (chosen_E1V * skill_1SV)
    terms_ESV = torch.where(counts_ESV > 0, counts_ESV * ratio_ESV.log(), 0.0)
    free_V = ((chosen_E1V > 0).sum((0, 1)) - 1) * ((skill_1SV > 0).sum((0, 1)) - 1)
    return float(terms_ESV.sum() / n), float(free_V.clamp(min=0).sum() / (2 * n))
