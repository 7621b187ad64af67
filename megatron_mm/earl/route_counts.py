"""Counts of routes by expert, skill and token, and the lift, clusters and information they give.

Routers depend on the token more than on anything else. So all figures compare within a token: an
expert that serves a skill is chosen more often for it than for other skills *at the same token*.
Where the skill says nothing beyond the token, the lift is 1 and the information 0.

Shapes: T positions, L layers, k experts chosen at a position, E experts, S skills, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

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

    def sums(self) -> torch.Tensor:
        """Returns fp64 [L, E, S], over the tokens."""
        *sizes, tokens = self.sizes
        found = torch.zeros(prod(sizes), dtype=torch.float64)
        return found.index_add_(0, self.cells // tokens, self.counts.double()).view(sizes)

    def layer(self, layer: int) -> LayerCounts:
        """Returns the counts of one layer."""
        _, experts, skills, tokens = self.sizes
        span = experts * skills * tokens
        ends = torch.tensor([layer * span, (layer + 1) * span])
        here = slice(*torch.searchsorted(self.cells, ends).tolist())
        cells = self.cells[here] - layer * span
        seen, token_C = (cells % tokens).unique(return_inverse=True)
        expert_C, skill_C = cells // tokens // skills, cells // tokens % skills
        counts = self.counts[here].double()
        return LayerCounts((experts, skills, len(seen)), expert_C, skill_C, token_C, counts)


@dataclass(frozen=True)
class LayerCounts:
    """The counts of one layer, without those that are 0. A dense table of 512 experts and the
    tokens of a probe would be hundreds of megabytes.

    Attributes:
        sizes: E, S, and V', the number of tokens that occur.
        expert_C, skill_C, token_C: int64, what each count is of; tokens are numbered below V'.
        count_C: fp64.
    """

    sizes: tuple[int, int, int]
    expert_C: torch.Tensor
    skill_C: torch.Tensor
    token_C: torch.Tensor
    count_C: torch.Tensor

    def of_experts(self) -> torch.Tensor:
        """Returns fp64 [E, S], over the tokens."""
        experts, skills, _ = self.sizes
        found = torch.zeros(experts * skills, dtype=torch.float64)
        found.index_add_(0, self.expert_C * skills + self.skill_C, self.count_C)
        return found.view(experts, skills)

    def of_tokens(self) -> torch.Tensor:
        """Returns fp64 [S, V'], over the experts."""
        _, skills, tokens = self.sizes
        found = torch.zeros(skills * tokens, dtype=torch.float64)
        found.index_add_(0, self.skill_C * tokens + self.token_C, self.count_C)
        return found.view(skills, tokens)


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


def lift(counts: LayerCounts, given_token: bool = True, prior: float = 5.0) -> torch.Tensor:
    """Returns [E, S]: how often an expert is chosen for a skill, over how often its rate at the
    same tokens lets one expect. `prior` choices are added to both, so that rare ones stay near 1.

    The expected count is the sum over v of n(e, v) n(s, v) / n(v): expert and skill independent
    given the token (the pooling of Mantel and Haenszel).

    Args:
        given_token: False: without regard to the token, as if all were one.
    """
    chosen_ES = counts.of_experts()
    if given_token:
        skill_SV = counts.of_tokens()
        share_VS = (skill_SV / skill_SV.sum(0)).T
        expected_ES = torch.zeros_like(chosen_ES)
        parts_CS = counts.count_C.unsqueeze(1) * share_VS[counts.token_C]
        expected_ES.index_add_(0, counts.expert_C, parts_CS)
    else:
        skill_S = chosen_ES.sum(0)
        expected_ES = chosen_ES.sum(1, keepdim=True) * skill_S / skill_S.sum().clamp(min=1)
    return (chosen_ES + prior) / (expected_ES + prior)


def lifts(counts: RouteCounts, given_token: bool = True, prior: float = 5.0) -> torch.Tensor:
    """Returns fp64 [L, E, S]: the `lift` of every layer."""
    layers = range(counts.sizes[0])
    return torch.stack([lift(counts.layer(layer), given_token, prior) for layer in layers])


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


def mutual_information(counts: LayerCounts) -> tuple[float, float]:
    """Returns I(expert; skill | token) of one layer in nats, and the part that chance alone lets
    one expect: the sum over v of (E_v - 1)(S_v - 1) / 2n with the experts and skills seen at v
    (Miller-Madow), which is right for many counts only; `shuffled_skills` tells it for few."""
    n = float(counts.count_C.sum())
    if n == 0:
        return 0.0, 0.0
    tokens, token_C, count_C = counts.sizes[2], counts.token_C, counts.count_C
    skill_SV = counts.of_tokens()
    pairs, where = (counts.expert_C * tokens + token_C).unique(return_inverse=True)
    chosen_C = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, where, count_C)[where]
    at_C = chosen_C * skill_SV[counts.skill_C, token_C]
    nats = float((count_C * (count_C * skill_SV.sum(0)[token_C] / at_C).log()).sum())
    experts_V, skills_V = torch.bincount(pairs % tokens, minlength=tokens), (skill_SV > 0).sum(0)
    free_V = (experts_V - 1) * (skills_V - 1)
    return nats / n, float(free_V.clamp(min=0).sum()) / (2 * n)


def shuffled_skills(skill_T: torch.Tensor, token_T: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns the skills exchanged at random among positions with the same token: routes say
    nothing about them beyond the token. Positions without a skill (-1) keep none."""
    here = (skill_T >= 0).nonzero().flatten()
    token_H = token_T[here]
    generator = torch.Generator().manual_seed(seed)
    plain_H = token_H.argsort(stable=True)
    mixed_H = torch.randperm(len(here), generator=generator)
    mixed_H = mixed_H[token_H[mixed_H].argsort(stable=True)]
    found_T = skill_T.clone()
    found_T[here[plain_H]] = skill_T[here[mixed_H]]
    return found_T
