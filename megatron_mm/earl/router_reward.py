"""The router reward: how often a completion's labelled tokens met the experts of their skill.

Shapes: T positions whose logits were sampled (the last prompt token up to the second-to-last
token of the completion), L layers, k experts chosen at a position, E experts, S skills, N
completions. `skill_T` is int64 with -1 outside every span; `member_SLE` is
`SkillMap.membership()`, or its part for the layers at hand. A layer in which a skill has no
experts is not counted for that skill.

All sums add up over positions, layers and ranks, so ranks exchange sums, never routes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mm.earl.spans import Span
from megatron_mm.errors import RLError

# Columns of `hit_sums`.
HITS, CHANCE, COUNT, EARNED = range(4)


def label_positions(length: int, spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `skill_T` (int64) and `correct_T` (bool) of one completion of `length` tokens,
    T = length.

    The position that sampled token i stands one before it in the stream and is number i here, so
    a span keeps its numbers.

    Raises:
        RLError: for spans that are empty, overlap or leave the completion.
    """
    skill_T = torch.full((length,), -1)
    correct_T = torch.zeros(length, dtype=torch.bool)
    end = 0
    for start, stop, skill, correct in sorted(spans):
        if not end <= start < stop <= length:
            raise RLError(
                f"a span of tokens {start} to {stop}, the one before ends at {end} and the "
                f"completion at {length}; spans may be neither empty nor overlap"
            )
        skill_T[start:stop], correct_T[start:stop] = skill, bool(correct)
        end = stop
    return skill_T, correct_T


def hit_sums(
    routes_TLk: torch.Tensor,
    skill_T: torch.Tensor,
    correct_T: torch.Tensor,
    completion_T: torch.Tensor,
    num_completions: int,
    member_SLE: torch.Tensor,
) -> torch.Tensor:
    """Sums each completion's hits and chances, skill by skill.

    Args:
        routes_TLk: int16, the experts chosen, as recorded.
        correct_T: bool, the position is in a span whose (sub-)answer is right.
        completion_T: int64, the number of the completion that a position belongs to.
    Returns:
        fp64 [N, S, 4], summed over positions and layers: the share of the k slots that fell into
        the cluster of the position's skill, the share that a chance router would give it (the
        cluster's size over E), how many (position, layer) pairs there were, and the first minus
        the second where correct.
    Raises:
        RLError: for a labelled position whose route is no expert, as where none was recorded.
    """
    skills, layers, experts = member_SLE.shape
    sums = torch.zeros(num_completions * skills, 4, dtype=torch.float64, device=skill_T.device)
    labelled = (skill_T >= 0).nonzero().flatten()
    skill_T, routes_TLk = skill_T[labelled], routes_TLk[labelled].long()
    odd = routes_TLk[(routes_TLk < 0) | (routes_TLk >= experts)]
    if len(odd):
        raise RLError(
            f"{len(odd)} routes of labelled positions are no expert (the first is {int(odd[0])}, "
            f"experts are 0 to {experts - 1}); label only positions whose routes were recorded"
        )
    correct_T, row_T = correct_T[labelled], completion_T[labelled] * skills + skill_T
    size_SL = member_SLE.sum(2)
    for layer in range(layers):
        counts_T = (size_SL[skill_T, layer] > 0).double()
        hits_T = member_SLE[skill_T.unsqueeze(1), layer, routes_TLk[:, layer]].double().mean(1)
        chance_T = size_SL[skill_T, layer].double() / experts
        earned_T = (hits_T - chance_T) * correct_T
        # Without a cluster hits and chance are 0 by themselves.
        sums.index_add_(0, row_T, torch.stack((hits_T, chance_T, counts_T, earned_T), 1))
    return sums.view(num_completions, skills, 4)


def router_reward(sums_NS4: torch.Tensor) -> torch.Tensor:
    """Returns fp64 [N]: hit share minus chance share over the positions inside spans, averaged
    over positions and layers, where only right answers earn; never below 0, and 0 without a span.

    The mean is over all labelled positions: a completion with one right step of five earns a fifth
    of one with five.
    """
    earned_N, count_N = sums_NS4[..., EARNED].sum(1), sums_NS4[..., COUNT].sum(1)
    return (earned_N / count_N.clamp(min=1)).clamp(min=0)


def hit_rates(sums_S4: torch.Tensor) -> torch.Tensor:
    """Returns [S, 2]: hit share and chance share of each skill, right or wrong; NaN for a skill
    that was not seen.

    Args:
        sums_S4: `hit_sums`, summed over completions and ranks.
    """
    count_S1 = sums_S4[:, COUNT : COUNT + 1]
    return sums_S4[:, [HITS, CHANCE]] / torch.where(count_S1 > 0, count_S1, torch.nan)
