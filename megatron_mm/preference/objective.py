"""The objective of preference pairs.

The losses are not linear in log-probabilities, so they need the sums over whole answers, which may
lie on several context-parallel ranks. Those sums are N numbers. Autograd finds the slope of the
loss at each, and sum_t slope(answer of t) log p_t over a rank's own tokens has the gradient of the
loss exactly, on any layout and with any split into microbatches of whole pairs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm import platform
from megatron_mm.model.layers.output import Predictions
from megatron_mm.model.routing import RouterTerm
from megatron_mm.plugins import unique_name
from megatron_mm.preference.batch import PreferenceBatch
from megatron_mm.preference.losses import Pairs, sides
from megatron_mm.preference.settings import PREFERENCE_LOSSES, DPOConfig, loss_terms
from megatron_mm.report.metrics import Metrics
from megatron_mm.rl.policy_losses import completion_sums


class PreferenceObjective:
    """The weighted losses of pairs; an `engine.objective.Objective`."""

    router_term: RouterTerm | None = None

    def __init__(self, dpo: DPOConfig):
        self.dpo, self.terms = dpo, loss_terms(dpo)
        self._names: dict[str, str] = {}  # in metrics, where dpo is the sum of all
        for term in self.terms:
            self._names[term] = unique_name(term, {"dpo", *self._names.values()})

    def positions(self, batch: PreferenceBatch) -> torch.Tensor:
        return batch.sampled

    def loss(
        self,
        predictions: Predictions,
        batch: PreferenceBatch,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
        metrics: Metrics,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = platform.moved(positions_K, predictions.device)
        logprobs_K = predictions.logprobs(batch.labels_T[rows])
        completion_K = batch.completion_T[rows]
        logprobs_K = torch.where(completion_K >= 0, logprobs_K, 0.0)
        sums_N = completion_sums(logprobs_K.detach().double(), completion_K, len(batch.lengths_N))
        if pg.cp.size() > 1:
            dist.all_reduce(sums_N, group=pg.cp)
        pairs = Pairs(sums_N.requires_grad_(), batch.ref_logps_N, batch.lengths_N, batch.delta)
        of_terms = {name: PREFERENCE_LOSSES[name](pairs, self.dpo) for name in self.terms}
        loss = torch.stack([self.terms[name] * of.sum() for name, of in of_terms.items()]).sum()
        (slopes_N,) = torch.autograd.grad(loss, sums_N)
        # Completion -1, of tokens that are in no answer, takes the last entry.
        slopes_K = torch.cat((slopes_N, slopes_N.new_zeros(1)))[completion_K]
        surrogate = (slopes_K.to(logprobs_K.dtype) * logprobs_K).sum()
        first = pg.cp.rank() == 0  # a pair is counted once
        if first:
            self._measure(metrics, pairs, of_terms, loss.detach())
        value = loss.detach() if first else torch.zeros_like(loss)
        total = surrogate + (value - surrogate.detach()).to(surrogate.dtype)
        return total, torch.full_like(loss, batch.pairs * first).detach().int()

    def _measure(
        self,
        metrics: Metrics,
        pairs: Pairs,
        of_terms: dict[str, torch.Tensor],
        loss: torch.Tensor,
    ) -> None:
        """Adds TRL's metrics, each a mean over pairs, and the losses."""
        logps_N = pairs.logps_N.detach()
        chosen_P, rejected_P = (self.dpo.dpo_beta * s for s in sides(logps_N - pairs.ref_logps_N))
        count = len(chosen_P)
        metrics.ratio("train/dpo_loss", loss, count)
        for name, of in of_terms.items():
            metrics.ratio(f"train/{self._names[name]}_loss", of.detach().sum(), count)
        for name, values_P in (
            ("rewards/chosen", chosen_P),
            ("rewards/rejected", rejected_P),
            ("rewards/margins", chosen_P - rejected_P),
            ("rewards/accuracies", (chosen_P > rejected_P).double()),
            ("logps/chosen", sides(logps_N)[0]),
            ("logps/rejected", sides(logps_N)[1]),
        ):
            metrics.ratio(name, values_P.sum(), count)
        metrics.sum("train/pairs", count)
