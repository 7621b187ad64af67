"""The interface of an objective: what a run optimises. Supervised fine-tuning is in train/sft.py,
reinforcement learning in rl/objective.py; config/objectives.py finds them by name."""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.data.batch import Microbatch
from megatron_mm.model.layers.output import Predictions
from megatron_mm.model.routing import RouterTerm
from megatron_mm.report.metrics import Metrics

PARTS = ("positions", "loss", "router_term")


class Objective[B: Microbatch](Protocol):
    """The objective of batches of one type.

    Attributes:
        router_term: a loss that every router of the model gets beside the main one; None for
            nothing.
    """

    router_term: RouterTerm | None

    def positions(self, batch: B) -> torch.Tensor:
        """int64, ascending, on the CPU: the positions of the stream where `loss` needs
        predictions."""
        ...

    def loss(
        self,
        predictions: Predictions,
        batch: B,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
        metrics: Metrics,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss of one microbatch, on the last stage.

        Args:
            predictions: at `positions_K` of the stream. Its log-probabilities and entropies of the
                whole vocabulary never need all logits at once; its `logits` are this
                tensor-parallel rank's slice.
            positions_K: on the CPU; those of `positions` that this context-parallel rank holds,
                or, if it holds none, any one that is not of them.
            metrics: takes whatever is worth a number. A number that is not finite ends the run.
        Returns:
            the loss summed over this part's supervised tokens, and their number (int), which the
            sum over microbatches and ranks is divided by.
        """
        ...
