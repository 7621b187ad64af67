"""The router term: a loss of the routers' own, on the tokens that exercise a skill.

There are two forms. Where routers choose the best experts, the term raises the probability of the
skill's cluster (`cluster_log_mass`). Where a rollout draws its experts, the term is REINFORCE with
the router as a policy (`drawn_router_loss`).

Both are sums of weighted terms. The weights of completions are made here, those of supervised
fine-tuning in align_term.py.

Shapes as in router_reward.py: T positions of the stream, t those of them that a rank holds, G
tokens of one completion, k experts chosen, E experts, S skills, L layers. A position without a
skill has skill -1 and so the last row of the clusters: the common one with `SkillMap.clusters()`.
With `SkillMap.membership()` it must weigh 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from megatron_mm import platform
from megatron_mm.data.batch import Microbatch
from megatron_mm.earl.router_reward import label_positions
from megatron_mm.earl.spans import Span
from megatron_mm.parallel.sequence import take
from megatron_mm.report.metrics import Metrics


@dataclass(frozen=True)
class RouterTargets:
    """The targets of the router term for one microbatch, beside the skills of its positions.

    Attributes:
        weight_T: fp32, the factor of each position's term; 0: nothing is taught there.
        cluster_SLE: bool, the clusters of a skill map.
        scale: factor of the whole term. It holds what the objective's loss will be divided by.
        temperature: at which experts were drawn; 0: the routers chose the best ones.
    """

    weight_T: torch.Tensor
    cluster_SLE: torch.Tensor
    scale: float
    temperature: float = 0.0

    def to(self, device: torch.device | str) -> RouterTargets:
        names = ("weight_T", "cluster_SLE")
        moved = {name: platform.moved(getattr(self, name), device) for name in names}
        return replace(self, **moved)

    def term(
        self,
        logits_tE: torch.Tensor,
        batch: Microbatch,
        moe_index: int,
        positions: range,
        metrics: Metrics,
    ) -> torch.Tensor:
        """Returns one layer's term over some positions; see `model.routing.RouterTerm`. Adds
        `moe/cluster_mass`, the mean probability that the router gives the cluster of a position
        with a skill."""
        assert batch.skill_T is not None  # whoever makes targets has labelled the positions
        cluster_SE = self.cluster_SLE[:, moe_index]
        skill_t, weight_t = take(batch.skill_T, positions), take(self.weight_T, positions)
        log_mass_t = cluster_log_mass(logits_tE, skill_t, cluster_SE)
        labelled_t = (skill_t >= 0) & _clustered(skill_t, cluster_SE)
        mass_t = torch.where(labelled_t, log_mass_t.detach().exp(), 0.0)
        metrics.ratio("moe/cluster_mass", mass_t.sum(), labelled_t.sum())
        if not self.temperature:
            return -(weight_t * log_mass_t).sum() * self.scale
        assert batch.routes is not None  # replayed, or the draws would not be known
        drawn_tk = take(batch.routes[moe_index], positions)
        loss = drawn_router_loss(
            logits_tE, drawn_tk, skill_t, weight_t, cluster_SE, self.temperature
        )
        return loss * self.scale


class Targets(Protocol):
    """Router targets of one microbatch: `RouterTargets`, or a teacher's routes."""

    def to(self, device: torch.device | str) -> Targets: ...

    def term(
        self,
        logits_tE: torch.Tensor,
        batch: Microbatch,
        moe_index: int,
        positions: range,
        metrics: Metrics,
    ) -> torch.Tensor | None:
        """Returns one layer's term over some positions; see `model.routing.RouterTerm`."""
        ...


@dataclass(frozen=True)
class Several:
    """Targets that are learnt together: the sum of their terms."""

    parts: tuple[Targets, ...]

    def to(self, device: torch.device | str) -> Several:
        return Several(tuple(part.to(device) for part in self.parts))

    def term(self, *given, **named) -> torch.Tensor | None:
        """See `Targets.term`."""
        terms = [part.term(*given, **named) for part in self.parts]
        found = [term for term in terms if term is not None]
        return torch.stack(found).sum() if found else None


@dataclass(kw_only=True)
class TaughtBatch(Microbatch):
    """A microbatch with what its routers learn; None: nothing."""

    router: Targets | None = None


def taught(batch: Microbatch, targets: Targets) -> TaughtBatch:
    """Adds what its routers learn to a microbatch, beside what they learn from it already."""
    if not isinstance(batch, TaughtBatch):
        return TaughtBatch(**vars(batch), router=targets)
    return replace(
        batch, router=targets if batch.router is None else Several((batch.router, targets))
    )


def router_term(
    logits_tE: torch.Tensor, batch: Microbatch, moe_index: int, positions: range, metrics: Metrics
) -> torch.Tensor | None:
    """The term of the batch's own targets; a `model.routing.RouterTerm`."""
    assert isinstance(batch, TaughtBatch) and batch.router is not None
    return batch.router.term(logits_tE, batch, moe_index, positions, metrics)


# ---- weights of completions ----


class CompletionWeights(NamedTuple):
    """The weights of one completion's router term, constants.

    Attributes:
        skill_G: int64, the skill of each sampled token; -1: none.
        weight_G: fp32, the factor of each token's term.
        counted_G: fp32. The term is divided by the sum of these over positions, layers in which
            the skill has experts, and the whole step.
    """

    skill_G: torch.Tensor
    weight_G: torch.Tensor
    counted_G: torch.Tensor


def rewarded_weights(length: int, spans: Sequence[Span], reward: float) -> CompletionWeights:
    """Returns the weights where routers choose the best experts: the completion's task reward,
    never below 0, where its span is right, else 0. The term is a mean with these weights. It only
    ever pulls towards the cluster of a right answer: that other experts served a wrong one is no
    evidence against them.

    Args:
        reward: NaN for a completion that is left out of the loss.
    """
    skill_G, correct_G = label_positions(length, spans)
    worth = 0.0 if math.isnan(reward) else max(reward, 0.0)
    weight_G = worth * (correct_G & (skill_G >= 0)).float()
    return CompletionWeights(skill_G, weight_G, weight_G)


def drawn_weights(
    spans: Sequence[Span], advantages_G: torch.Tensor, *, kept: bool, clip: float
) -> CompletionWeights:
    """Returns the weights where experts are drawn: the advantage, held between -`clip` and `clip`,
    at every labelled token but the first, whose experts the prompt's own pass took without a draw.
    Where experts are drawn, those of a completion that did worse have done worse than others might
    have, so the term pushes too, whether a span is right or wrong. Nothing bounds how far: it is
    for routes that these very weights drew. The term is a mean over these tokens.

    Args:
        kept: whether the completion takes part in the loss; if not, nothing is taught.
        clip: bound of the advantage (`router_loss_clip`).
    """
    skill_G, _ = label_positions(len(advantages_G), spans)
    taught_G = (skill_G >= 0) & kept
    taught_G[:1] = False
    weight_G = advantages_G.detach().clamp(-clip, clip) * taught_G
    return CompletionWeights(skill_G, weight_G.float(), taught_G.float())


def sum_counted(weights: Iterable[CompletionWeights], cluster_SLE: torch.Tensor) -> float:
    """Returns the sum of `counted_G` over tokens and the layers where their skill has experts."""
    layers_S = cluster_SLE.any(2).sum(1).double()
    return sum(float((layers_S[w.skill_G] * w.counted_G).sum()) for w in weights)


# ---- where routers choose the best experts ----


def cluster_log_mass(
    router_logits_TE: torch.Tensor, skill_T: torch.Tensor, cluster_SE: torch.Tensor
) -> torch.Tensor:
    """Returns [T]: log of the probability that the router's softmax gives the cluster of the
    position's skill in one layer; 0 where the cluster is empty.

    As a cluster's mass nears 1 the gradient vanishes, so its negative needs no lower bound.
    """
    clustered_T = _clustered(skill_T, cluster_SE)
    # Where nothing is taught every expert counts: the mass is 1 and the gradient is finite.
    inside_TE = cluster_SE[skill_T] | ~clustered_T.unsqueeze(1)
    logits_TE = _at_least_fp32(router_logits_TE)
    inside_T = logits_TE.masked_fill(~inside_TE, -torch.inf).logsumexp(1)
    return torch.where(clustered_T, inside_T - logits_TE.logsumexp(1), 0.0)


# ---- where experts are drawn ----


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
    cluster_SE: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Returns one layer's term where experts were drawn: minus the weighted sum of their
    log-probabilities at positions with a skill that has experts in the layer.

    Args:
        experts_Tk: int16, as recorded; anything where the weight is 0.
    """
    taught_T = (skill_T >= 0) & _clustered(skill_T, cluster_SE) & (weights_T != 0)
    any_k = torch.arange(experts_Tk.shape[1], device=experts_Tk.device)  # k different ones
    experts_Tk = torch.where(taught_T.unsqueeze(1), experts_Tk.long(), any_k)
    logprobs_T = drawn_log_probability(router_logits_TE, experts_Tk, temperature)
    return -(weights_T * torch.where(taught_T, logprobs_T, 0.0)).sum()


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.itemsize < 4 else logits


def _clustered(skill_T: torch.Tensor, cluster_SE: torch.Tensor) -> torch.Tensor:
    return cluster_SE.any(1)[skill_T]  # -1 is the last row
