"""What a run optimises. The loop knows only this interface; SFT is the first, GRPO will be
another, and neither is a second loop."""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_mm.data.batch import Microbatch
from megatron_mm.parallel.sequence import part, take

# Sums over tokens; a metric is sums[name][0] / sums[name][1] over all microbatches and ranks.
Sums = dict[str, torch.Tensor]


class Objective(Protocol):
    def loss(
        self, logits_T1V: torch.Tensor, batch: Microbatch, pg: ProcessGroupCollection
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """On the last stage, for one microbatch.

        Args:
            logits_T1V: this context-parallel rank's part of the stream and this tensor-parallel
                rank's slice of the vocabulary, [T / CP, 1, V / TP].
        Returns:
            the loss summed over this part's supervised tokens, their number (int), and sums to
            log, each a tensor [numerator, denominator].
        """
        ...


class SupervisedFineTuning:
    """Cross entropy of the next token over the assistant's turns."""

    def loss(
        self, logits_T1V: torch.Tensor, batch: Microbatch, pg: ProcessGroupCollection
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        mine = part(len(batch.labels_T), pg.cp)
        labels, mask = take(batch.labels_T, mine).unsqueeze(1), take(batch.loss_mask_T, mine)
        per_token = vocab_parallel_cross_entropy(logits_T1V.float(), labels, tp_group=pg.tp)
        total, count = (per_token.squeeze(1) * mask).sum(), mask.sum()
        return total, count.int(), {"lm loss": torch.stack((total.detach(), count))}


OBJECTIVES = {"sft": SupervisedFineTuning}
