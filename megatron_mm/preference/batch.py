"""The microbatch of preference pairs that is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mm.rl.completion_batch import CompletionBatch
from megatron_mm.rl.policy_losses import completion_sums


@dataclass(kw_only=True)
class PreferenceBatch(CompletionBatch):
    """A microbatch of whole pairs: N samples, chosen and rejected by turns.

    Attributes:
        ref_logps_N: fp64, the log-probability of each answer under the reference model.
        delta: see `losses.Pairs`; the same in all microbatches of a step.
    """

    ref_logps_N: torch.Tensor
    delta: float

    @property
    def pairs(self) -> int:
        return len(self.lengths_N) // 2

    @property
    def loss_weight(self) -> torch.Tensor:
        """See `Microbatch.loss_weight`: the loss is divided by pairs."""
        return self.loss_mask_T.new_full((), self.pairs)


def preference_batch(
    batch: CompletionBatch, ref_logprobs_T: torch.Tensor, delta: float
) -> PreferenceBatch:
    """Completes a microbatch of pairs.

    Args:
        ref_logprobs_T: of its answers' tokens under the reference, 0 elsewhere.
    """
    # In fp64, so that equal log-probabilities of policy and reference have equal sums, however the
    # tokens lie on ranks.
    sums_N = completion_sums(ref_logprobs_T.double(), batch.completion_T, len(batch.lengths_N))
    half_N = torch.full((len(batch.lengths_N),), 0.5)  # an answer is half a pair
    values = vars(batch) | {"position_weight_T": batch.position_weights(half_N)}
    return PreferenceBatch(**values, ref_logps_N=sums_N, delta=delta)
