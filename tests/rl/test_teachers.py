"""On-policy distillation by enumeration: whose teacher, what it is worth, what is descended."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_mm.errors import DataError
from megatron_mm.generation.lanes import Completion
from megatron_mm.rl.completion_batch import CompletionBatch
from megatron_mm.rl.credit import Credited, credit, teacher_gaps, teacher_sums
from megatron_mm.rl.logprobs import Logprobs
from megatron_mm.rl.policy_losses import (
    Tokens,
    importance_weights,
    loss_denominator,
    policy_loss,
)
from megatron_mm.rl.rollout.draw import Group
from megatron_mm.rl.rollout.score import Scored
from megatron_mm.rl.settings import RLConfig, resolve_algorithm
from megatron_mm.rl.teachers import teacher_of

VOCABULARY, LENGTH = 4, 3
TOGETHER = dict(teacher_load=["one"], teacher_kl_coef=0.7)


def batch_of(members: list[int], length: int, teacher: str) -> CompletionBatch:
    """A microbatch of completions alone, without prompts."""
    total = len(members) * length
    whole = torch.zeros(total, dtype=torch.int64)
    return CompletionBatch(
        **dict.fromkeys(CompletionBatch.__dataclass_fields__)
        | {
            "tokens_T": whole,
            "loss_mask_T": torch.ones(total),
            "members": members,
            "completion_T": torch.arange(len(members)).repeat_interleave(length),
            "lengths_N": torch.full((len(members),), length),
            "teacher": teacher,
        }
    )


def scored(rewards_PGC: torch.Tensor, length: int) -> Scored:
    """Completions of tokens that play no part."""
    prompts, size, _ = rewards_PGC.shape
    one = Completion(torch.zeros(length, dtype=torch.int64), torch.zeros(length), True)
    return Scored(
        groups=tuple(Group(number, (one,) * size, None) for number in range(prompts)),
        names=("exact",) * rewards_PGC.shape[2],
        rewards_PGC=rewards_PGC,
        failed_PGC=torch.zeros_like(rewards_PGC, dtype=torch.bool),
        spans=tuple(tuple([] for _ in range(size)) for _ in range(prompts)),
        rounds=1,
        generated=prompts * size,
        missing=0,
        skipped=(),
        failures=(),
        seconds={},
    )


def credited(rl, rewards_PGC, gaps) -> Credited:
    weights = [1.0] * rewards_PGC.shape[2]
    return credit(scored(rewards_PGC, LENGTH), weights, rl, None, None, lambda t: t, gaps)


def test_gaps_are_found_in_whatever_microbatch_they_are():
    """Completions 2 and 0 with one teacher, 1 with another; log p_teacher - log p_policy."""
    batches = [batch_of([2, 0], 2, "a"), batch_of([1], 2, "b"), batch_of([], 2, "b")]
    known = []
    for batch in batches:
        old_T = torch.arange(len(batch.tokens_T)) / 8
        member = [10.0 * n + g for n in batch.members for g in range(2)]
        known.append(Logprobs(old_T, old_T, None, None, old_T + torch.tensor(member)))
    gaps = teacher_gaps(batches, known)
    assert [gap.tolist() for gap in gaps] == [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]
    assert teacher_sums(batches, known) == {
        "teacher/kl": [-63.0, 6],
        "teacher/kl/a": [-42.0, 4],
        "teacher/kl/b": [-21.0, 2],
    }


def test_a_teachers_advantage_is_added_to_the_rewards():
    rewards_PGC = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).unsqueeze(2)
    gaps = [torch.tensor([0.1, -0.2, 0.3]) * n for n in range(4)]
    both = resolve_algorithm(RLConfig(**TOGETHER, algorithm="dr_grpo", reward_funcs=["exact"]))
    found = credited(both, rewards_PGC, gaps)
    for base, gap, tokens in zip([0.5, -0.5, 0, 0], gaps, found.token_advantages, strict=True):
        assert tokens.tolist() == pytest.approx([base + 0.7 * g for g in gap.tolist()])


@pytest.mark.parametrize(
    "algorithm", ["grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
)
def test_without_rewards_a_teacher_is_all_there_is(algorithm):
    """Nothing is left out, and equal log-probabilities give exact zeros."""
    rl = resolve_algorithm(RLConfig(**TOGETHER, algorithm=algorithm, advantage_clip_sigma=0.0))
    gaps = [torch.tensor([0.0, -0.2, 0.3]), torch.zeros(3)]
    found = credited(rl, torch.zeros(2, 1, 0), gaps)
    for gap, tokens in zip(gaps, found.token_advantages, strict=True):
        assert torch.equal(tokens, 0.7 * gap)
    assert found.kept_N == [True, True] and not found.advantages.sums


def test_the_expected_gradient_is_that_of_the_reverse_divergence():
    """A tabular policy, whose logits depend on the whole prefix, and every completion with its
    probability. The gradient is that of the sum over positions of KL(policy || teacher) of the next
    token, at prefixes of the policy's own; the divergence the other way round has another."""
    generator = torch.Generator().manual_seed(0)
    rl = resolve_algorithm(
        RLConfig(
            teacher_load=["one"],
            teacher_kl_coef=1.0,
            num_generations=1,
            loss_agg_mode="seq-mean-token-sum",
        )
    )
    prefixes = [p for n in range(LENGTH) for p in product(range(VOCABULARY), repeat=n)]
    place = {prefix: n for n, prefix in enumerate(prefixes)}
    shape = len(prefixes), VOCABULARY
    student, teacher = (torch.randn(shape, generator=generator).double() for _ in range(2))
    student.requires_grad_()
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    every = list(product(range(VOCABULARY), repeat=LENGTH))
    at = [([place[y[:n]] for n in range(LENGTH)], list(y)) for y in every]
    of_student = [log_s[rows, ids] for rows, ids in at]
    gaps = [
        log_t[rows, ids] - mine.detach() for (rows, ids), mine in zip(at, of_student, strict=True)
    ]
    advantages = credited(rl, torch.zeros(len(every), 1, 0), gaps).token_advantages
    total = torch.zeros((), dtype=torch.float64)
    for logprobs_K, advantages_K in zip(of_student, advantages, strict=True):
        one = torch.zeros(LENGTH, dtype=torch.int64)
        lengths_N = torch.tensor([LENGTH])
        tokens = Tokens(logprobs_K, logprobs_K.detach(), advantages_K, one, lengths_N)
        loss = policy_loss(tokens, rl)[0] / loss_denominator(rl.loss_agg_mode, lengths_N, LENGTH)
        total = total + logprobs_K.detach().sum().exp() * loss
    (found,) = torch.autograd.grad(total, student, retain_graph=True)

    reach = [
        sum((log_s[place[p[:n]], p[n]] for n in range(len(p))), torch.zeros(()).double()).exp()
        for p in prefixes
    ]
    weights = torch.stack(reach).detach()
    reverse = (weights * (log_s.exp() * (log_s - log_t)).sum(1)).sum()
    forward = (weights * (log_t.exp() * (log_t - log_s)).sum(1)).sum()
    (expected,) = torch.autograd.grad(reverse, student, retain_graph=True)
    (other,) = torch.autograd.grad(forward, student)
    # Advantages are fp32 sums with the base of 0: 1e-7 of numbers around 1.
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert (found - other).norm() > 0.1 * other.norm()


def test_mopds_weights_with_their_bounds():
    """sg[w_t a_t] grad log p, w_t = r_t where 0.5 <= r_t <= 2 and else 0, before any update (arXiv
    2603.19220, eq. 2 to 4). Both bounds are inside; masked tokens stay in the divisor."""
    rl = resolve_algorithm(
        RLConfig(
            **TOGETHER,
            rollout_is="token",
            rollout_is_mode="mask",
            rollout_is_threshold_low=0.5,
            rollout_is_threshold=2.0,
            loss_agg_mode="token-mean",
        )
    )
    ratios_K = torch.tensor([0.49, 0.5, 1.0, 2.0, 2.01])
    rollout_K = torch.full((5,), -1.5)
    one, lengths_N = torch.zeros(5, dtype=torch.int64), torch.tensor([5])
    old_K = rollout_K + ratios_K.log()
    weights_K = importance_weights(old_K, rollout_K, one, 1, rl)
    logprobs_K = old_K.clone().requires_grad_()
    gaps_K = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    tokens = Tokens(logprobs_K, old_K, gaps_K, one, lengths_N, rollout_weights_K=weights_K)
    numerator, sums = policy_loss(tokens, rl)
    (numerator / loss_denominator(rl.loss_agg_mode, lengths_N, 5)).backward()
    expected = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0]) * gaps_K
    torch.testing.assert_close(logprobs_K.grad, -expected / 5)
    assert sums["rollout_is/frac_masked"].tolist() == [2, 5]


@pytest.mark.parametrize("value", [None, "c", 1, ["a"]])
def test_a_row_without_a_teacher_is_named(value):
    rl = RLConfig(teacher_load=["a=one", "b=two"], teacher_key="domain")
    assert teacher_of({"domain": "b"}, "rows:1", rl) == "b"
    with pytest.raises(DataError) as caught:
        teacher_of({"domain": value}, "rows:7", rl)
    assert str(caught.value) == (
        f"rows:7: domain is {value!r}; allowed: the name of a teacher of teacher_load, a, b"
    )
    assert teacher_of({}, "rows:1", RLConfig(teacher_load=["one"])) == "teacher"
    assert teacher_of({}, "rows:1", RLConfig()) is None
