"""The objective of reinforcement learning: the policy loss over sampled tokens, and EARL's term
for the routers. The mathematics are in rl/; here they meet the model's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.distributed import ProcessGroup

from megatron_mm.earl.router_reward import drawn_router_loss, router_loss
from megatron_mm.engine.engine import Engine
from megatron_mm.model.routing import RouterTerm, Routes
from megatron_mm.parallel.sequence import take
from megatron_mm.report.metrics import Metrics
from megatron_mm.rl.policy_batch import PolicyBatch
from megatron_mm.rl.policy_losses import Tokens, logprob_abs_diff, loss_denominator, policy_loss
from megatron_mm.rl.settings import RLConfig


class PolicyObjective:
    """
    Args:
        rl: with nothing left open (`resolve_algorithm`).
    """

    router_term: RouterTerm | None = None

    def __init__(self, rl: RLConfig):
        self.rl = rl

    def positions(self, batch: PolicyBatch) -> torch.Tensor:
        return batch.sampled

    def loss(
        self,
        logits_K1V: torch.Tensor,
        batch: PolicyBatch,
        positions_K: torch.Tensor,
        pg: ProcessGroupCollection,
        metrics: Metrics,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = positions_K.to(logits_K1V.device, non_blocking=True)
        logprobs_K, entropy_K = sampled_logprobs(
            logits_K1V, batch.labels_T[rows], self.rl.temperature, pg.tp
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
            (lambda sums_N: _summed(sums_N, pg.cp)) if pg.cp.size() > 1 else None,
        )
        numerator, sums = policy_loss(tokens, self.rl)
        count = loss_denominator(
            self.rl.loss_agg_mode, tokens.lengths_N, self.rl.max_completion_length
        )
        if pg.cp.rank():
            count = torch.zeros_like(count)  # the completions are counted once
        mask_K = tokens.mask_K
        sums |= logprob_abs_diff(tokens, at(batch.rollout_logprobs_T))
        for name, (total, number) in sums.items():
            metrics.ratio(name, total, number)
        metrics.ratio("train/policy_loss", numerator, count)
        metrics.ratio("entropy", torch.where(mask_K, entropy_K, 0.0).double().sum(), mask_K.sum())
        return numerator, count.int()


class ExpertAlignedObjective(PolicyObjective):
    """With the router term.

    Args:
        member_SLE: bool, `SkillMap.membership()`.
    """

    def __init__(self, rl: RLConfig, member_SLE: torch.Tensor):
        super().__init__(rl)
        self.member_SLE = member_SLE

    def router_term(
        self, logits_tE: torch.Tensor, batch: PolicyBatch, moe_index: int, positions: range
    ) -> torch.Tensor | None:
        member_SE = self.member_SLE[:, moe_index].to(logits_tE.device, non_blocking=True)
        skill_t, weight_t = take(batch.skill_T, positions), take(batch.router_weight_T, positions)
        if self.rl.router_temperature:
            drawn_tk = take(batch.routes[moe_index], positions)
            loss = drawn_router_loss(
                logits_tE, drawn_tk, skill_t, weight_t, member_SE, self.rl.router_temperature
            )
        else:
            loss, _ = router_loss(logits_tE, skill_t, weight_t, member_SE)
        return loss * batch.router_scale


def sampled_logprobs(
    logits_K1V: torch.Tensor, labels_K: torch.Tensor, temperature: float, tp: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [K]: log-probabilities of the labels at this temperature, differentiable; entropy of
    the distributions in nats, without gradient. `logits`: a slice of the vocabulary."""
    scaled_K1V = logits_K1V.float() / temperature
    with torch.no_grad():
        entropy_K = _entropy(scaled_K1V[:, 0], tp)
    # It may overwrite its argument.
    losses_K1 = vocab_parallel_cross_entropy(scaled_K1V, labels_K.unsqueeze(1), tp_group=tp)
    return -losses_K1.squeeze(1), entropy_K


def _entropy(logits_KV: torch.Tensor, tp: ProcessGroup) -> torch.Tensor:
    """log Z - E[logit]"""
    highest_K = logits_KV.amax(1)
    if tp.size() > 1:
        dist.all_reduce(highest_K, op=dist.ReduceOp.MAX, group=tp)
    shifted_KV = logits_KV - highest_K.unsqueeze(1)
    mass_KV = shifted_KV.exp()
    sums_2K = torch.stack((mass_KV.sum(1), (mass_KV * shifted_KV).sum(1)))
    if tp.size() > 1:
        dist.all_reduce(sums_2K, group=tp)
    return sums_2K[0].log() - sums_2K[1] / sums_2K[0]


def _summed(sums: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    sums = sums.clone()
    dist.all_reduce(sums, group=group)
    return sums


def trainer_logprobs(
    engine: Engine,
    batches: Sequence[PolicyBatch],
    temperature: float,
    routes: list[Routes] | None = None,
) -> list[torch.Tensor]:
    """fp32 [T] of each microbatch, on the CPU of every rank of the replica: the log-probabilities
    of sampled tokens at their positions, 0 elsewhere. Every rank of the job calls it.

    Args:
        routes: filled as by `Engine.forward`.
    """
    groups = engine.groups

    def finish(logits: torch.Tensor, batch: PolicyBatch, positions: torch.Tensor) -> torch.Tensor:
        rows = positions.to(logits.device)
        logprobs_K, _ = sampled_logprobs(logits, batch.labels_T[rows], temperature, groups.pg.tp)
        here_K = batch.completion_T[rows] >= 0
        whole = torch.zeros(len(batch.tokens_T))
        whole[positions] = torch.where(here_K, logprobs_K, 0.0).cpu()
        return whole

    found = engine.forward(batches, lambda batch: batch.sampled, finish, routes=routes)
    lengths = [len(batch.tokens_T) for batch in batches]
    total = torch.zeros(sum(lengths))
    # Context-parallel ranks hold different positions, tensor-parallel ones the same.
    if groups.is_last_stage and groups.pg.tp.rank() == 0:
        total = torch.cat(found)
    dist.all_reduce(total, group=groups.replica)
    return list(total.split(lengths))
