"""Expert scope: the positions whose gradient reaches the weights of an expert.

With a scope the routed experts of a skill learn from positions of that skill alone: a row of expert
e counts in e's weight gradient only if its position has a skill and e is in the skill's cluster of
that layer. What the layer computes, and the gradients of its inputs and of the gate's
probabilities, stay as they are, to the bit.

Whether a row teaches its expert must go where the row goes, through megatron-core's dispatcher to
another rank. It travels in the sign of the row's probability, which is never negative: -p for a row
that does not teach, -0.0 included (`signed`). The experts read the sign and take it off (`read`).
Both multiply by 1 or -1, which is exact, also for the gradient that comes back. So no dispatcher
may compare or add probabilities on the way. `alltoall` only moves them, and only after the router's
load balancing has seen them plain; `flex` takes the k largest, and is refused.

Shapes: T stream, t positions whose hidden state this rank holds (`parallel.sequence.shard`), R
routed rows, E experts, S skills, L layers of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.autograd.function import once_differentiable

from megatron_mm.data.batch import Microbatch
from megatron_mm.model.layers.row_groups import RowGroups
from megatron_mm.parallel.sequence import shard, take


@dataclass(frozen=True)
class ExpertScope:
    """The scope of one microbatch on this rank.

    Attributes:
        clusters_SLE: bool; the skill's experts of each layer.
        skill_t: int64, the skill of each position; -1: none.
        begins_t: bool; positions that predict the first token of an answer.
    """

    clusters_SLE: torch.Tensor
    skill_t: torch.Tensor
    begins_t: torch.Tensor

    @classmethod
    def of(
        cls, batch: Microbatch, clusters_SLE: torch.Tensor, pg: ProcessGroupCollection
    ) -> ExpertScope:
        """
        Raises:
            ValueError: if the batch does not say which skills its positions have.
        """
        if batch.skill_T is None:
            raise ValueError(
                f"a microbatch of {len(batch.tokens_T)} tokens has no skill_T, which experts in "
                "scope learn by; label its spans, or train without expert_scope"
            )
        learnt_T = batch.loss_mask_T > 0
        begins_T = learnt_T.clone()
        begins_T[1:] &= ~learnt_T[:-1]  # the last position of a sample predicts nothing
        own = shard(len(batch.tokens_T), pg)
        return cls(clusters_SLE, take(batch.skill_T, own), take(begins_T, own))

    def teaches(self, moe_index: int) -> torch.Tensor:
        """Returns bool [t, E]: whether a position teaches an expert of this layer."""
        inside_tE = self.clusters_SLE[:, moe_index][self.skill_t.clamp(min=0)]
        return inside_tE & (self.skill_t >= 0).unsqueeze(1)


def signed(probs: torch.Tensor, teaches: torch.Tensor) -> torch.Tensor:
    """Returns the probabilities, with the sign bit set where `teaches` is False."""
    return probs * _sign(probs, teaches)


def read(signed_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (probabilities, teaches) from `signed` ones."""
    teaches_R = ~signed_R.signbit()
    return signed_R * _sign(signed_R, teaches_R), teaches_R


def _sign(like: torch.Tensor, teaches: torch.Tensor) -> torch.Tensor:
    return torch.where(teaches, 1.0, -1.0).to(like.dtype)


class TaughtWeights(torch.autograd.Function):
    """y, unchanged, where y was computed from x by weights that autograd does not know: it gives
    the weights the gradient of the rows that teach. For products of others, whose own weight
    gradients know no rows.

    Args (of `apply`): y_RO, x_RI, weight_EOI, teaches_R, groups of the rows.
    """

    @staticmethod
    def forward(ctx, y_RO, x_RI, weight_EOI, teaches_R, groups: RowGroups):
        ctx.groups = groups
        ctx.save_for_backward(x_RI, teaches_R)
        return y_RO.view_as(y_RO)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RO):
        if not ctx.needs_input_grad[2]:
            return d_RO, None, None, None, None
        x_RI, teaches_R = ctx.saved_tensors
        taught_RO = d_RO.masked_fill(~teaches_R.unsqueeze(1), 0.0)
        return d_RO, None, ctx.groups.weight_gradients(taught_RO, x_RI), None, None
