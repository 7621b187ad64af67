"""The term of a teacher's routes: the student's routers learn which experts its steps use.

For a layer l of the student, which listens to layer l' of the teacher, and supervised positions t,

    m_l = - sum_t sum_b q_tb log p_S(b | t)        q_t = A_l^T p_T(t)

with p_T the probabilities of the teacher's router in layer l', A_l [E_T, E_S] with rows that sum to
1, and p_S those of the student's. The step minimises

    L = L_sft + lambda(step) * sum_l m_l / (layers * supervised tokens)

At fixed q the least m_l is the entropy of q, at p_S = q. What the recorded k experts leave of p_T
is spread evenly over the teacher's others. Related: LLaVA-MoD (arXiv 2408.15881) distils outputs;
TGR-MoE (arXiv 2604.21330) a router into a router of as many experts.

Shapes: T positions of the stream, t those that a rank holds, k experts recorded, E_T and E_S
experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megatron_mm import platform
from megatron_mm.data.batch import Microbatch
from megatron_mm.mimic.batch import MimicBatch, TopExperts
from megatron_mm.parallel.sequence import take
from megatron_mm.report.metrics import Metrics


def annealed(coefficient: float, step: int, train_iters: int, share: float) -> float:
    """Returns the coefficient of a step: it falls linearly to 0 over a share of the run.

    Args:
        step: steps done.
        share: of `train_iters`; 0: the coefficient is held.
    """
    if not share:
        return coefficient
    return coefficient * max(0.0, 1.0 - step / (share * train_iters))


def whole_distribution(held: TopExperts, experts: int) -> torch.Tensor:
    """Returns fp32 [t, E_T]: the recorded probabilities, and what they leave, spread evenly over
    the other experts. Without others the recorded ones are scaled to sum to 1."""
    experts_tk, weights_tk = held.experts_Tk.long(), held.weights_Tk.float()
    recorded = experts_tk.shape[1]
    total_t1 = weights_tk.sum(1, keepdim=True)
    if recorded == experts:
        spread_t1, weights_tk = torch.zeros_like(total_t1), weights_tk / total_t1.clamp(min=1e-6)
    else:
        spread_t1 = (1.0 - total_t1).clamp(min=0.0) / (experts - recorded)
    return spread_t1.expand(-1, experts).scatter(1, experts_tk, weights_tk)


def route_cross_entropy(logits_tE: torch.Tensor, q_tE: torch.Tensor) -> torch.Tensor:
    """Returns [t]: the cross entropy between q and the softmax of a router's logits."""
    logits_tE = logits_tE.float() if logits_tE.itemsize < 4 else logits_tE
    return -(q_tE * logits_tE.log_softmax(1)).sum(1)


@dataclass(frozen=True)
class RouteTargets:
    """Targets that a teacher gives the routers of a rank's stages.

    Attributes:
        layers: student's layer -> teacher's, of the layers that learn here.
        experts: student's layer -> A, fp32 [E_T, E_S].
        scale: factor of the term of each layer, lambda / layers; 0: it is only measured.
    """

    layers: Mapping[int, int]
    experts: Mapping[int, torch.Tensor]
    scale: float

    def to(self, device: torch.device | str) -> RouteTargets:
        moved = {index: platform.moved(a, device) for index, a in self.experts.items()}
        return replace(self, experts=moved)

    def term(
        self,
        logits_tE: torch.Tensor,
        batch: Microbatch,
        moe_index: int,
        positions: range,
        metrics: Metrics,
    ) -> torch.Tensor | None:
        """Returns one layer's term over some positions; see `model.routing.RouterTerm`. Adds
        `moe/mimic_kl`, the mean divergence KL(q, p_S) at supervised positions."""
        if moe_index not in self.layers:
            return None
        assert isinstance(batch, MimicBatch)  # whoever makes targets has the teacher's routes
        held = batch.teacher_routes[self.layers[moe_index]]
        here = TopExperts(*(take(x, positions) for x in held))
        map_TS, mask_t = self.experts[moe_index], take(batch.loss_mask_T, positions)
        q_tE = whole_distribution(here, len(map_TS)) @ map_TS
        entropy_t = route_cross_entropy(logits_tE, q_tE)
        own_t = torch.special.entr(q_tE).sum(1)
        # Without gradient the numbers are the same, whether or not the term counts.
        metrics.ratio("moe/mimic_kl", ((entropy_t.detach() - own_t) * mask_t).sum(), mask_t.sum())
        return (entropy_t * mask_t).sum() * self.scale if self.scale else None
