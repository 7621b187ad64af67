"""Metrics of skills and experts over a rollout.

Functions return pairs [numerator, denominator], to be summed over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mm.earl.alignment import Hits
from megatron_mm.earl.route_counts import count_routes, mutual_information, shuffled_skills
from megatron_mm.earl.router_reward import hit_rates, label_positions
from megatron_mm.earl.spans import Span
from megatron_mm.generation.lanes import Completion

MAX_COUNTED = 1 << 14  # positions behind a rollout's mutual information

Pairs = dict[str, list[float]]


def hit_pairs(hits: Hits, skills: Sequence[str]) -> Pairs:
    """Returns the hit rates of the found map and of its shuffled copy, and the rate by chance,
    each over all skills and by skill."""
    pairs: Pairs = {}
    for which, columns in (
        (hits.found, ("hit_rate", "chance")),
        (hits.control, ("hit_rate_shuffled",)),
    ):
        sums_S4 = which.sum(0)
        rates = hit_rates(sums_S4)
        for column, name in enumerate(columns):
            shares, counts = rates[:, column].tolist(), sums_S4[:, 2].tolist()
            for skill, share, count in zip(skills, shares, counts, strict=True):
                if count:
                    pairs[f"rollout/moe/{name}/{skill}"] = [share * count, count]
                    whole = pairs.setdefault(f"rollout/moe/{name}", [0.0, 0.0])
                    whole[0] += share * count
                    whole[1] += count
    return pairs


def expert_load(
    completions: Sequence[Completion], layers: Sequence[int], num_experts: int
) -> dict[int, torch.Tensor]:
    """Returns how often each expert of each of this rank's layers was used, in all hops: moe index
    -> int64 [E]; empty where no routes were recorded."""
    recorded = [c.routes_SLk for c in completions if c.routes_SLk is not None]
    if not recorded:
        return {}
    routes_SLk = torch.cat(recorded).long()
    return {
        layer: torch.bincount(chosen[chosen >= 0], minlength=num_experts)
        for layer, chosen in zip(layers, routes_SLk.unbind(1), strict=True)
    }


def information_pairs(
    completions: Sequence[Completion],
    spans: Sequence[Sequence[Span]],
    layers: int,
    k: int,
    sizes: tuple[int, int, int],
) -> Pairs:
    """Returns I(expert; skill | token) beyond chance, in nats, over this replica's completions
    alone: the counts are too many to be sent. Chance is what skills give that are exchanged among
    positions with the same token. Layers and replicas count by their positions.

    Args:
        layers: number of this rank's layers, those of the recorded routes.
        k: experts of the first hop, which are counted.
        sizes: experts of a layer, skills, tokens of the vocabulary.
    """
    routes, skills, tokens = [], [], []
    for completion, marks in zip(completions, spans, strict=True):
        count = len(completion.tokens_G)
        # The first sampled position is left out: its token belongs to the prompt.
        routes.append(completion.routes_GLk[1:, :, :k])
        skills.append(label_positions(count, marks)[0][1:])
        tokens.append(completion.tokens_G[:-1])
    # A sample of positions bounds what a rollout pays for it.
    cut = slice(MAX_COUNTED)
    routes_TLk, skill_T, token_T = (torch.cat(parts)[cut] for parts in (routes, skills, tokens))
    positions = float((skill_T >= 0).sum())
    excess = 0.0
    for sign, skills_T in ((1, skill_T), (-1, shuffled_skills(skill_T, token_T, seed=1))):
        counts = count_routes(routes_TLk, skills_T, token_T, *sizes)
        excess += sign * sum(mutual_information(counts.layer(n))[0] for n in range(layers))
    return {"rollout/moe/mutual_information": [excess * positions, layers * positions]}


def load_violation(load_LE: torch.Tensor) -> dict[str, float]:
    """Returns how far the busiest expert is above the mean, averaged over the layers that were used
    (MaxVio, arXiv 2408.15664).

    Args:
        load_LE: int64, `expert_load` of every layer, summed over ranks.
    """
    used = [counts for counts in load_LE if counts.any()]
    if not used:
        return {}
    worst = [float(counts.max() / counts.double().mean()) - 1 for counts in used]
    return {"rollout/moe/max_violation": sum(worst) / len(worst)}
