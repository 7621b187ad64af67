"""EARL: the reward for routing a skill's tokens through its experts, and the router's own term.

Shapes: T positions whose logits were sampled (the last prompt token up to the second-to-last
token of the completion), L layers, k experts chosen at a position, E experts, S skills, N
completions. `skill_T` is int64 with -1 outside every span; `member_SLE` is
`SkillMap.membership()`, or its part for the layers at hand. A layer in which a skill has no
experts says nothing about that skill and is not counted.

All sums add up over positions, layers and ranks, so only they travel, never the indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mm.errors import RLError

# Columns of the sums of `hit_sums`.
HITS, CHANCE, COUNT, EARNED = range(4)


def label_positions(
    length: int, spans: Sequence[tuple[int, int, int, bool]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`skill_T` and `correct_T` of one completion of `length` tokens, T = length.

    The position that sampled token i stands one before it in the stream and is number i here, so
    a span keeps its numbers. Each span is (first token, end, skill id or -1, right or not).
    Raises RLError for spans that overlap or leave the completion.
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
    """What each completion routed where.

    Args:
        routes_TLk: int16, the experts chosen, as recorded.
        correct_T: bool, the position is in a span whose (sub-)answer is right.
        completion_T: int64, which completion a position belongs to.
    Returns:
        fp64 [N, S, 4], summed over positions and layers: the share of the k slots that fell into
        the cluster of the position's skill, the share that a chance router would give it (the
        cluster's size over E), how many there were, and the first minus the second where correct.
    Raises RLError for a labelled position whose route is no expert, as where none was recorded.
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
    """fp64 [N]: hit share minus chance share over the positions inside spans, averaged over
    positions and layers, where only right answers earn; never below 0, and 0 without a span.

    The mean is over all labelled positions: a completion with one right step of five earns a fifth
    of one with five.
    """
    earned_N, count_N = sums_NS4[..., EARNED].sum(1), sums_NS4[..., COUNT].sum(1)
    return (earned_N / count_N.clamp(min=1)).clamp(min=0)


def hit_rates(sums_S4: torch.Tensor) -> torch.Tensor:
    """[S, 2]: hit share and chance share of each skill, right or wrong; NaN for one not seen.
    `sums_S4`: sums of `hit_sums` over completions and ranks."""
    count_S1 = sums_S4[:, COUNT : COUNT + 1]
    return sums_S4[:, [HITS, CHANCE]] / torch.where(count_S1 > 0, count_S1, torch.nan)


def router_weights(
    advantages_T: torch.Tensor, correct_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """[T], constants: the advantage of a position's completion, held between 0 and `clip`, where
    its span is right, else 0. The term only ever pulls towards the cluster of a right answer in a
    completion that did better than its group: that other experts served a wrong one is no
    evidence against them."""
    return advantages_T.detach().clamp(0, clip) * correct_T


def cluster_log_mass(
    router_logits_TE: torch.Tensor, skill_T: torch.Tensor, member_SE: torch.Tensor
) -> torch.Tensor:
    """[T]: log of the probability that the router's softmax gives the cluster of the position's
    skill in one layer; 0 where there is no skill or no cluster."""
    clustered_T = _clustered(skill_T, member_SE)
    # Where nothing is asked every expert counts: the mass is 1 and the gradient is finite.
    inside_TE = member_SE[skill_T.clamp(min=0)] | ~clustered_T.unsqueeze(1)
    logits_TE = _at_least_fp32(router_logits_TE)
    inside_T = logits_TE.masked_fill(~inside_TE, -torch.inf).logsumexp(1)
    return torch.where(clustered_T, inside_T - logits_TE.logsumexp(1), 0.0)


def router_loss(
    router_logits_TE: torch.Tensor,
    skill_T: torch.Tensor,
    weights_T: torch.Tensor,
    member_SE: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's router term, before its coefficient: minus the weighted sum of
    `cluster_log_mass`, and how many positions it is over (int64; those with weight 0 included).
    The term is the first over the second, each summed over layers, microbatches and ranks.

    As a cluster's mass nears 1 the gradient vanishes, so the term needs no upper bound.
    """
    mass_T = cluster_log_mass(router_logits_TE, skill_T, member_SE)
    return -(weights_T * mass_T).sum(), _clustered(skill_T, member_SE).sum()


def drawn_weights(advantages_T: torch.Tensor, clip: float) -> torch.Tensor:
    """[T], constants: the advantage of a position's completion, held between -`clip` and `clip`.
    Where experts are drawn, those of a completion that did worse have done worse than others
    might have, so the term pushes too, whether a span is right or wrong. Nothing bounds how far:
    it is for routes that these very weights drew."""
    return advantages_T.detach().clamp(-clip, clip)


def drawn_log_probability(
    router_logits_TE: torch.Tensor, experts_Tk: torch.Tensor, temperature: float
) -> torch.Tensor:
    """[T]: log-probability of drawing these experts, int64, in this order and without replacement,
    from the softmax of one layer's logits over `temperature`: each from what the earlier ones left
    (Kool, van Hoof and Welling 2019, arXiv 1903.06059, Theorem 1)."""
    logits_TE = _at_least_fp32(router_logits_TE) / temperature
    chosen_Tk = logits_TE.gather(1, experts_Tk)
    masses = chosen_Tk.flip(1)  # the last one first: each is drawn from itself and those before
    if experts_Tk.shape[1] < logits_TE.shape[1]:  # the gradient of no mass at all would be NaN
        never_T1 = logits_TE.scatter(1, experts_Tk, -torch.inf).logsumexp(1, keepdim=True)
        masses = torch.cat((never_T1, masses), 1)
    left_Tk = masses.logcumsumexp(1)[:, -experts_Tk.shape[1] :].flip(1)
    return (chosen_Tk - left_Tk).sum(1)


def drawn_router_loss(
    router_logits_TE: torch.Tensor,
    experts_Tk: torch.Tensor,
    skill_T: torch.Tensor,
    weights_T: torch.Tensor,
    member_SE: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """`router_loss` where experts were drawn: minus the weighted sum of their log-probabilities at
    the same positions, REINFORCE for the router as a policy. `experts_Tk`: int16, as recorded;
    anything where there is no skill."""
    clustered_T = _clustered(skill_T, member_SE)
    any_k = torch.arange(experts_Tk.shape[1], device=experts_Tk.device)  # k different ones
    experts_Tk = torch.where(clustered_T.unsqueeze(1), experts_Tk.long(), any_k)
    logprobs_T = drawn_log_probability(router_logits_TE, experts_Tk, temperature)
    return -(weights_T * torch.where(clustered_T, logprobs_T, 0.0)).sum()


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.itemsize < 4 else logits


def _clustered(skill_T: torch.Tensor, member_SE: torch.Tensor) -> torch.Tensor:
    return (skill_T >= 0) & member_SE.any(1)[skill_T.clamp(min=0)]
