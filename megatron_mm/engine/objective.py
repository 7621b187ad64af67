"""What a run optimises. The loop knows only this interface; SFT is here, reinforcement learning
in rl/objective.py, and neither is a second loop."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_mm.data.batch import Microbatch

# Sums over tokens; a metric is sums[name][0] / sums[name][1] over all microbatches and ranks.
Sums = dict[str, torch.Tensor]


class Objective(Protocol):
    def positions(self, batch: Microbatch) -> torch.Tensor:
        """int64, ascending, on the CPU: the positions of the stream whose logits `loss` needs."""
        ...

    def loss(
        self,
        logits_K1V: torch.Tensor,
        batch: Microbatch,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        """On the last stage, for one microbatch.

        Args:
            logits_K1V: at `positions_K` of the stream, this tensor-parallel rank's slice of the
                vocabulary, [K, 1, V / TP].
            positions_K: on the CPU; those of `positions` that this context-parallel rank holds,
                or, if it holds none, any one that is not of them.
        Returns:
            the loss summed over this part's supervised tokens, their number (int), and sums to
            log, each a tensor [numerator, denominator].
        """
        ...


@runtime_checkable
class TeachesRouters(Protocol):
    """An objective that also has a loss for the router of every layer of experts. Its sums have
    "router_loss", 0 over what the main loss is divided by; the numerator comes from the routers."""

    def router_term(
        self, logits_tE: torch.Tensor, batch: Microbatch, moe_index: int, positions: range
    ) -> torch.Tensor | None:
        """On every stage, for one microbatch and layer: see `model.routing.RouterTerm`."""
        ...


class SupervisedFineTuning:
    """Cross entropy of the next token over the assistant's turns."""

    def positions(self, batch: Microbatch) -> torch.Tensor:
        return batch.loss_mask_T.nonzero().flatten()

    def loss(
        self,
        logits_K1V: torch.Tensor,
        batch: Microbatch,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
    ) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        rows = positions_K.to(logits_K1V.device, non_blocking=True)
        labels, mask = batch.labels_T[rows].unsqueeze(1), batch.loss_mask_T[rows]
        per_token = vocab_parallel_cross_entropy(logits_K1V.float(), labels, tp_group=pg.tp)
        total, count = (per_token.squeeze(1) * mask).sum(), mask.sum()
        return total, count.int(), {"lm loss": torch.stack((total.detach(), count))}
