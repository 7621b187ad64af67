"""The objective of reinforcement learning: the policy loss over sampled tokens and, with EARL, the
router term."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_mm import platform
from megatron_mm.earl.router_term import router_term
from megatron_mm.model.layers.output import Predictions
from megatron_mm.model.routing import RouterTerm
from megatron_mm.report.metrics import Metrics
from megatron_mm.rl.policy_batch import PolicyBatch
from megatron_mm.rl.policy_losses import Tokens, logprob_abs_diff, policy_loss
from megatron_mm.rl.settings import ResolvedRL


class PolicyObjective:
    """The policy loss; an `engine.objective.Objective`."""

    router_term: RouterTerm | None = None

    def __init__(self, rl: ResolvedRL):
        self.rl = rl

    def positions(self, batch: PolicyBatch) -> torch.Tensor:
        return batch.sampled

    def loss(
        self,
        predictions: Predictions,
        batch: PolicyBatch,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
        metrics: Metrics,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = platform.moved(positions_K, predictions.device)
        logprobs_K, entropy_K = predictions.logprobs_and_entropy(
            batch.labels_T[rows], self.rl.temperature
        )

        def at(values_T: torch.Tensor | None) -> torch.Tensor | None:
            return None if values_T is None else values_T[rows]

        old_K = at(batch.old_logprobs_T)
        tokens = Tokens(
            logprobs_K,
            logprobs_K.detach() if old_K is None else old_K,
            at(batch.advantages_T),
            batch.completion_T[rows],
            batch.lengths_N.to(rows.device),
            at(batch.ref_logprobs_T),
            at(batch.rollout_weights_T),
            entropy_K if self.rl.entropy_coef else None,
            at(batch.kl_weights_T),
            at(batch.learnt_T),
            (lambda sums_N: _summed(sums_N, pg.cp)) if pg.cp.size() > 1 else None,
        )
        numerator, sums = policy_loss(tokens, self.rl)
        count = batch.divisor
        if pg.cp.rank():
            count = torch.zeros_like(count)  # the completions are counted once
        mask_K = tokens.mask_K
        sums |= logprob_abs_diff(tokens, at(batch.rollout_logprobs_T))
        for name, (total, number) in sums.items():
            metrics.ratio(name, total, number)
        metrics.ratio("train/policy_loss", numerator, count)
        entropy = torch.where(mask_K, entropy_K.detach(), 0.0).double().sum()
        metrics.ratio("entropy", entropy, mask_K.sum())
        return numerator, count.int()


class ExpertAlignedObjective(PolicyObjective):
    """The policy loss with EARL's router term (earl/router_term.py), whose targets stand in the
    batches' `router`."""

    def __init__(self, rl: ResolvedRL):
        super().__init__(rl)
        self.router_term = router_term


def _summed(sums: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    sums = sums.clone()
    dist.all_reduce(sums, group=group)
    return sums
