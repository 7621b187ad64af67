"""The router term: a loss of the routers' own, on the tokens that exercise a skill.

There are two forms. Where routers choose the best experts, the term raises the probability of the
skill's cluster at right answers (`router_loss`). Where a rollout draws its experts, the term is
REINFORCE with the router as a policy (`drawn_router_loss`).

Shapes as in router_reward.py: T positions whose logits were sampled, t those of them that a rank
holds, G tokens of one completion, k experts chosen, E experts, S skills, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megatron_mm import platform
from megatron_mm.earl.router_reward import label_positions
from megatron_mm.earl.spans import Span
from megatron_mm.parallel.sequence import take


class CompletionTargets(NamedTuple):
    """The targets of the router term for one completion.

    Attributes:
        skill_G: int64, the skill of each sampled token; -1: nothing is taught there.
        weight_G: fp32, the factor of each token's term; a constant.
    """

    skill_G: torch.Tensor
    weight_G: torch.Tensor


def completion_targets(
    spans: Sequence[Span], advantages_G: torch.Tensor, *, kept: bool, clip: float, drawn: bool
) -> CompletionTargets:
    """Makes the targets of one completion.

    Args:
        kept: whether the completion takes part in the loss; if not, nothing is taught.
        clip: bound of the advantage (`router_loss_clip`).
        drawn: whether its experts were drawn (`router_temperature` above 0).
    """
    skill_G, correct_G = label_positions(len(advantages_G), spans)
    if not kept:
        skill_G.fill_(-1)
    if not drawn:
        return CompletionTargets(skill_G, router_weights(advantages_G, correct_G, clip))
    skill_G[:1] = -1  # drawn from the last prompt token, which took its best experts
    return CompletionTargets(skill_G, drawn_weights(advantages_G, clip))


def count_taught(targets: Iterable[CompletionTargets], member_SLE: torch.Tensor) -> int:
    """Returns how many (position, layer) pairs have a skill with experts in that layer. The router
    term is a mean over them."""
    layers_S = member_SLE.any(2).sum(1)
    return sum(int(layers_S[skill_G[skill_G >= 0]].sum()) for skill_G, _ in targets)


@dataclass(frozen=True)
class RouterTargets:
    """The targets of the router term for one microbatch.

    Attributes:
        skill_T: int64, the skill that each position of the stream exercises; -1: none.
        weight_T: fp32, the factor of each position's term.
        member_SLE: bool, `SkillMap.membership()`.
        scale: factor of the whole term: its coefficient, times what the objective's loss will be
            divided by, over the number of taught (position, layer) pairs of the minibatch.
        temperature: at which experts were drawn; 0: the routers chose the best ones.
    """

    skill_T: torch.Tensor
    weight_T: torch.Tensor
    member_SLE: torch.Tensor
    scale: float
    temperature: float

    def to(self, device: torch.device | str) -> RouterTargets:
        names = ("skill_T", "weight_T", "member_SLE")
        moved = {name: platform.moved(getattr(self, name), device) for name in names}
        return replace(self, **moved)

    def term(
        self,
        logits_tE: torch.Tensor,
        routes_Tk: torch.Tensor | None,
        moe_index: int,
        positions: range,
    ) -> torch.Tensor:
        """Returns one layer's term over some positions, a scalar with gradient to the logits.

        Args:
            routes_Tk: int16, the layer's drawn experts; needed with a temperature.
            positions: those of the stream that the t rows are.
        """
        member_SE = self.member_SLE[:, moe_index]
        skill_t, weight_t = take(self.skill_T, positions), take(self.weight_T, positions)
        if self.temperature:
            drawn_tk = take(routes_Tk, positions)
            loss = drawn_router_loss(
                logits_tE, drawn_tk, skill_t, weight_t, member_SE, self.temperature
            )
        else:
            loss, _ = router_loss(logits_tE, skill_t, weight_t, member_SE)
        return loss * self.scale


# ---- where routers choose the best experts ----


def router_weights(
    advantages_T: torch.Tensor, correct_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """Returns [T], constants: the advantage of a position's completion, held between 0 and `clip`,
    where its span is right, else 0. The term only ever pulls towards the cluster of a right answer
    in a completion that did better than its group: that other experts served a wrong one is no
    evidence against them."""
    return advantages_T.detach().clamp(0, clip) * correct_T


def cluster_log_mass(
    router_logits_TE: torch.Tensor, skill_T: torch.Tensor, member_SE: torch.Tensor
) -> torch.Tensor:
    """Returns [T]: log of the probability that the router's softmax gives the cluster of the
    position's skill in one layer; 0 where there is no skill or no cluster."""
    clustered_T = _clustered(skill_T, member_SE)
    # Where nothing is taught every expert counts: the mass is 1 and the gradient is finite.
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
    """Returns one layer's router term before its coefficient: minus the weighted sum of
    `cluster_log_mass`, and how many positions it is over (int64; those with weight 0 included).
    The term is the first over the second, each summed over layers, microbatches and ranks.

    As a cluster's mass nears 1 the gradient vanishes, so the term needs no upper bound.
    """
    mass_T = cluster_log_mass(router_logits_TE, skill_T, member_SE)
    return -(weights_T * mass_T).sum(), _clustered(skill_T, member_SE).sum()


# ---- where experts are drawn ----


def drawn_weights(advantages_T: torch.Tensor, clip: float) -> torch.Tensor:
    """Returns [T], constants: the advantage of a position's completion, held between -`clip` and
    `clip`. Where experts are drawn, those of a completion that did worse have done worse than
    others might have, so the term pushes too, whether a span is right or wrong. Nothing bounds how
    far: it is for routes that these very weights drew."""
    return advantages_T.detach().clamp(-clip, clip)


def drawn_log_probability(
    router_logits_TE: torch.Tensor, experts_Tk: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Returns [T]: the log-probability of drawing these experts, int64, in this order and without
    replacement, from the softmax of one layer's logits over `temperature`: each from what the
    earlier ones left (Kool, van Hoof and Welling 2019, arXiv 1903.06059, Theorem 1)."""
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
    """Returns `router_loss` where experts were drawn: minus the weighted sum of their
    log-probabilities at the same positions.

    Args:
        experts_Tk: int16, as recorded; anything where there is no skill.
    """
    clustered_T = _clustered(skill_T, member_SE)
    any_k = torch.arange(experts_Tk.shape[1], device=experts_Tk.device)  # k different ones
    experts_Tk = torch.where(clustered_T.unsqueeze(1), experts_Tk.long(), any_k)
    logprobs_T = drawn_log_probability(router_logits_TE, experts_Tk, temperature)
    return -(weights_T * torch.where(clustered_T, logprobs_T, 0.0)).sum()


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.itemsize < 4 else logits


def _clustered(skill_T: torch.Tensor, member_SE: torch.Tensor) -> torch.Tensor:
    return (skill_T >= 0) & member_SE.any(1)[skill_T.clamp(min=0)]
