"""Tokens of the highest entropy: TRL's quantile, its mask in the loss, the same on every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.generation.answers import answered
from megatron_mm.rl.completion_batch import completion_batch
from megatron_mm.rl.credit import credit
from megatron_mm.rl.logprobs import Logprobs
from megatron_mm.rl.policy_batch import policy_batches
from megatron_mm.rl.policy_losses import Tokens, entropy_threshold, loss_denominator, policy_loss
from megatron_mm.rl.settings import RLConfig, resolve_algorithm
from support.grpo_runs import assert_same_steps, grpo_run, on_rank_steps, trainer_of
from support.rollouts import alone, prompt, scored
from support.trainers import LAYOUTS

LENGTHS = [3, 1, 2, 4]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0, 1e-6])
@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_the_threshold_is_torchs_quantile(share, count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count))
    expected = torch.quantile(values.double(), 1 - share)
    assert float(entropy_threshold(values, share)) == pytest.approx(float(expected), rel=1e-14)


def test_of_no_token_nothing_is_learnt():
    assert entropy_threshold(torch.zeros(0), 0.2) == torch.inf


def trl_mask(entropies, mask, threshold):
    """TRL's `get_high_entropy_mask` by loops: lists of lists of one batch."""
    flat = sorted(e for row, kept in zip(entropies, mask, strict=True)
                  for e, m in zip(row, kept, strict=True) if m)  # fmt: skip
    place = threshold * (len(flat) - 1)
    low = int(place)
    high = flat[min(low + 1, len(flat) - 1)]
    least = flat[low] + (place - low) * (high - flat[low])
    return [
        [bool(m) and e >= least for e, m in zip(row, kept, strict=True)]
        for row, kept in zip(entropies, mask, strict=True)
    ]


def batches_of(*bins):
    return [
        completion_batch(
            [answered(prompt(), torch.arange(10, 10 + LENGTHS[n]), None) for n in members],
            members,
            settings=None,
            pad_id=0,
            pad_multiple=1,
        )
        for members in bins
    ]


ENTROPIES = [[0.1, 2.0, 0.3], [9.0], [1.5, 0.0], [0.7, 0.2, 3.0, 0.6]]


@pytest.mark.parametrize("bins", [([0, 1, 2, 3],), ([2, 0], [3, 1]), ([3], [2], [1], [0])])
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5])
def test_the_mask_is_trls_over_all_microbatches(bins, share):
    """Completion 1 failed: its token has the highest entropy and is in no quantile."""
    rl = resolve_algorithm(
        RLConfig(num_generations=2, algorithm="dr_grpo", top_entropy_quantile=share)
    )
    found = credit(scored([[1.0, float("nan")], [0.5, 0.25]]), [1.0], rl, None, None, alone)
    batches = batches_of(*bins)
    entropies = [torch.tensor(row) for row in ENTROPIES]
    known = [
        Logprobs(
            b.spread([]), None, None, None, entropy_T=b.spread([entropies[n] for n in b.members])
        )
        for b in batches
    ]
    made = policy_batches(batches, known, found, rl, None, alone, alone)
    learnt = {
        n: part.tolist()
        for batch, b in zip(batches, made, strict=True)
        for n, part in zip(b.members, batch.split(b.learnt_T), strict=True)
    }
    mask = [[n != 1] * length for n, length in enumerate(LENGTHS)]
    expected = trl_mask(ENTROPIES, mask, 1 - share)
    for n in (0, 2, 3):
        assert learnt[n] == expected[n]
    # Prompts and padding have entropy 0, below every threshold but that of all tokens.
    assert all((b.learnt_T & (b.completion_T < 0)).sum() <= 1 for b in made)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("policy", ["clip", "gspo"])
def test_only_those_tokens_have_a_gradient_and_the_mean_stays(policy, mode):
    """TRL multiplies the policy loss by the mask, then adds the KL term, then divides by the number
    of all tokens."""
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    logprobs, old, ref = (torch.randn(total, generator=generator).double() for _ in range(3))
    learnt = torch.rand(total, generator=generator) < 0.4
    completion = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)[completion]
    lengths = torch.tensor(LENGTHS)

    def of(**settings):
        beta = settings.pop("beta")
        rl = resolve_algorithm(RLConfig(policy_loss=policy, loss_agg_mode=mode, beta=beta))
        leaf = logprobs.clone().requires_grad_()
        tokens = Tokens(leaf, old, advantages, completion, lengths, ref if beta else None)
        numerator, sums = policy_loss(replace(tokens, **settings), rl)
        divisor = loss_denominator(mode, lengths, rl.max_completion_length)
        (gradient,) = torch.autograd.grad(numerator / divisor, leaf)
        return gradient, sums

    whole, _ = of(beta=0.0)
    masked, sums = of(beta=0.0, learnt_K=learnt)
    assert masked[learnt].abs().sum() > 0
    torch.testing.assert_close(masked, torch.where(learnt, whole, 0.0), rtol=1e-12, atol=0)
    assert sums["entropy/frac_learnt"].tolist() == [int(learnt.sum()), total]
    with_kl, _ = of(beta=0.3)
    both, _ = of(beta=0.3, learnt_K=learnt)
    torch.testing.assert_close(both - masked, with_kl - whole, rtol=1e-9, atol=1e-12)
    # Factors of beta: twice for one completion is twice its part.
    twice = torch.where(completion == 3, 2.0, 1.0).double()
    weighed, _ = of(beta=0.3, learnt_K=learnt, kl_weights_K=twice)
    torch.testing.assert_close(weighed - both, (twice - 1) * (both - masked), rtol=1e-9, atol=1e-12)
    plain, _ = of(beta=0.3, kl_weights_K=torch.ones(total).double())
    assert torch.equal(plain, with_kl)


# ---- in a run ----

SHARE = dict(top_entropy_quantile=0.25)


def on_rank_learnt(run: RunConfig) -> tuple[dict[int, list[bool]], list[float]]:
    """Returns for the first step, by the number of a completion's row and the completion's place,
    which of its tokens are learnt, and the shares of two steps."""
    trainer = trainer_of(run)
    try:
        collected = []
        collect = trainer.source.collector.collect
        trainer.source.collector.collect = lambda: collected.append(collect()) or collected[-1]
        batches, _ = trainer.source.next_step(False)
        groups = collected[0][0].groups
        size = run.section(RLConfig).num_generations
        learnt = {}
        for batch in batches:
            for n, part in zip(batch.members, batch.split(batch.learnt_T), strict=True):
                learnt[groups[n // size].number * size + n % size] = part.tolist()
        return learnt
    finally:
        trainer.source.close()


@pytest.fixture(scope="module")
def one_rank(ranks, scenes):
    (learnt,) = ranks(1, on_rank_learnt, grpo_run(scenes, **SHARE))
    (steps,) = ranks(1, on_rank_steps, grpo_run(scenes, **SHARE), 2)
    return learnt, steps


def test_a_quarter_of_the_tokens_is_learnt(ranks, scenes, one_rank):
    learnt, steps = one_rank
    tokens = sum(len(part) for part in learnt.values())
    # The quantile lies between two tokens.
    assert abs(sum(map(sum, learnt.values())) - tokens / 4) <= 1
    # Completions of a prompt share the distribution of their first token: up to 4 of 150 are tied.
    assert [step["entropy/frac_learnt"] for step in steps] == pytest.approx([0.25] * 2, abs=0.03)
    (plain,) = ranks(1, on_rank_steps, grpo_run(scenes), 1)
    assert plain[0]["train/grad_norm"] != pytest.approx(steps[0]["train/grad_norm"], rel=1e-2)
    assert plain[0]["reward"] == steps[0]["reward"]


@pytest.mark.parametrize("layout", ["TP2", "PP2", "CP2", "DP2", "EP2"])
def test_the_same_tokens_are_learnt_on_every_layout(ranks, scenes, one_rank, layout):
    learnt, steps = one_rank
    size, sizes = LAYOUTS[layout]
    found = {}
    for rank in ranks(size, on_rank_learnt, grpo_run(scenes, **SHARE, **sizes)):
        found |= rank
    assert found == learnt
    for rank in ranks(size, on_rank_steps, grpo_run(scenes, **SHARE, **sizes), 2):
        # As for other steps (test_grpo.py): rounding, which Adam makes a step of in the second.
        assert_same_steps(steps[:1], rank[:1], 2e-5)
        assert_same_steps(steps, rank, 2e-3)


def test_one_step_a_rollout_needs_the_pass_too(ranks, scenes):
    """There old log-probabilities are those of the training pass; entropies are measured before."""
    run = grpo_run(scenes, rollout_batch_size=4, **SHARE)
    (steps,) = ranks(1, on_rank_steps, run, 1)
    assert steps[0]["entropy/frac_learnt"] == pytest.approx(0.25, abs=0.03)
    assert steps[0]["clip_ratio/region_mean"] == 0
