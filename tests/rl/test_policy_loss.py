"""Every policy loss and its gradient against the papers' equations, under any split."""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_mm.rl.algorithms import ALGORITHMS
from megatron_mm.rl.policy_losses import (
    Tokens,
    importance_weights,
    kl_divergence,
    logprob_abs_diff,
    loss_denominator,
    policy_loss,
)
from megatron_mm.rl.settings import RLConfig, resolve_algorithm
from support import references

LENGTHS = [3, 1, 5, 2]
VOCAB = 3


@dataclass
class Case:
    tokens: list
    advantages: list
    old: list
    ref: list
    rollout: list | None = None


def make_case(seed=0, drift=0.6):
    """Returns theta and a case whose old log-probabilities are up to `drift` nats away."""
    rng = random.Random(seed)
    theta = [[[rng.gauss(0, 1) for _ in range(VOCAB)] for _ in range(n)] for n in LENGTHS]
    case = Case(
        tokens=[[rng.randrange(VOCAB) for _ in range(n)] for n in LENGTHS],
        advantages=[1.3, -0.7, -1.1, 0.4],
        old=None,
        ref=None,
    )
    for name, by in (("old", drift), ("ref", 0.5), ("rollout", 0.9)):
        shifted = [
            [references.logp(theta, case, i, t) + rng.uniform(-by, by) for t in range(n)]
            for i, n in enumerate(LENGTHS)
        ]
        setattr(case, name, shifted)
    return theta, case


def flat(nested):
    return torch.tensor([x for row in nested for x in row], dtype=torch.float64)


def entropy_of(logits_KV):
    return -(logits_KV.softmax(1) * logits_KV.log_softmax(1)).sum(1)


def make_tokens(theta, case, rl):
    """Returns the whole minibatch as one part, and the leaf that gradients end in."""
    logits_KV = torch.tensor([x for row in theta for x in row], dtype=torch.float64)
    logits_KV.requires_grad_()
    chosen_K = flat(case.tokens).long()
    logprobs_K = logits_KV.log_softmax(1).gather(1, chosen_K[:, None]).squeeze(1)
    lengths_N = torch.tensor(LENGTHS)
    completion_K = torch.arange(len(LENGTHS)).repeat_interleave(lengths_N)
    old_K, weights_K = flat(case.old), None
    if rl.rollout_is:
        weights_K = importance_weights(old_K, flat(case.rollout), completion_K, len(LENGTHS), rl)
    tokens = Tokens(
        logprobs_K,
        old_K,
        torch.tensor(case.advantages, dtype=torch.float64)[completion_K],
        completion_K,
        lengths_N,
        flat(case.ref) if rl.beta else None,
        weights_K,
        entropy_K=entropy_of(logits_KV) if rl.entropy_coef else None,
    )
    return tokens, logits_KV


def check(rl, seed=0, drift=0.6):
    theta, case = make_case(seed, drift)
    if not rl.rollout_is:
        case.rollout = None
    tokens, logits_KV = make_tokens(theta, case, rl)
    numerator, sums = policy_loss(tokens, rl)
    divisor = loss_denominator(rl.loss_agg_mode, tokens.lengths_N, rl.max_completion_length)
    (numerator / divisor).backward()
    assert float(numerator.detach() / divisor) == pytest.approx(
        references.loss(theta, theta, case, rl), rel=1e-12, abs=1e-14
    )
    expected = torch.tensor(references.gradient(theta, case, rl), dtype=torch.float64)
    assert expected.norm() > 1e-4
    # Central differences with a step of 1e-5 are good to some 1e-10.
    torch.testing.assert_close(logits_KV.grad.flatten(), expected, rtol=1e-6, atol=1e-9)
    return sums


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("seed", range(3))
def test_every_algorithm_equals_its_equation(algorithm, seed):
    check(resolve_algorithm(RLConfig(algorithm=algorithm, max_completion_length=7)), seed)


@pytest.mark.parametrize("policy", ["clip", "gspo", "sapo", "cispo", "reinforce"])
@pytest.mark.parametrize(
    "mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_every_loss_under_every_aggregation(policy, mode):
    rl = RLConfig(policy_loss=policy, loss_agg_mode=mode, epsilon=0.1, epsilon_high=0.15)
    check(resolve_algorithm(rl))


@pytest.mark.parametrize("policy", ["clip", "gspo"])
def test_the_dual_clip(policy):
    rl = RLConfig(policy_loss=policy, delta=1.25, loss_agg_mode="token-mean")
    # far off, so that negative advantages meet ratios above delta
    check(resolve_algorithm(rl), seed=1, drift=1.5)
    check(resolve_algorithm(rl), seed=2, drift=1.5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "cispo"])
def test_kl_in_the_loss(algorithm, estimator):
    sums = check(resolve_algorithm(RLConfig(algorithm, beta=0.3, kl_estimator=estimator)))
    theta, case = make_case()
    each = [
        references.kl(theta, case, estimator, i, t) for i, n in enumerate(LENGTHS) for t in range(n)
    ]
    assert sums["kl"].tolist() == pytest.approx([sum(each), len(each)])


def test_kl_in_the_reward_is_not_in_the_loss_but_logged():
    rl = resolve_algorithm(RLConfig(beta=0.3, use_kl_in_reward=True))
    assert "kl" in check(rl)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [1.1, 5.0])
def test_truncated_importance_sampling(level, threshold):
    rl = RLConfig(rollout_is=level, rollout_is_threshold=threshold, beta=0.1)
    check(resolve_algorithm(rl))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bounds", [(0.5, 2.0), (0.9, 1.1), (0.0, 1.0)])
def test_masked_importance_sampling(level, bounds):
    low, high = bounds
    rl = RLConfig(
        rollout_is=level,
        rollout_is_mode="mask",
        rollout_is_threshold_low=low,
        rollout_is_threshold=high,
        beta=0.1,
    )
    sums = check(resolve_algorithm(rl))
    masked, tokens = sums["rollout_is/frac_masked"].tolist()
    assert 0 < masked <= tokens


def test_bounds_of_importance_weights_are_inclusive():
    rl = resolve_algorithm(
        RLConfig(
            rollout_is="token",
            rollout_is_mode="mask",
            rollout_is_threshold_low=0.5,
            rollout_is_threshold=2.0,
        )
    )
    ratios_K = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    found_K = importance_weights(ratios_K.log(), torch.zeros(5), torch.zeros(5).long(), 1, rl)
    assert found_K.tolist() == pytest.approx([0.0, 0.5, 1.0, 2.0, 0.0])


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_entropy_is_rewarded(mode):
    check(resolve_algorithm(RLConfig(entropy_coef=0.2, loss_agg_mode=mode, beta=0.1)))


def some(tokens, keep_K, lengths_N=None):
    """Returns the tokens at `keep_K`; the others become no tokens (-1)."""
    return replace(
        tokens,
        completion_K=tokens.completion_K.where(keep_K, -1),
        lengths_N=tokens.lengths_N if lengths_N is None else lengths_N,
    )


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_any_split_gives_the_same_loss_and_gradient(algorithm):
    """Microbatches of other sizes split completions apart; context parallelism splits through the
    middle of one."""
    rl = resolve_algorithm(RLConfig(algorithm=algorithm, beta=0.2, rollout_is="token"))
    theta, case = make_case()
    tokens, logits_KV = make_tokens(theta, case, rl)
    whole, sums = policy_loss(tokens, rl)
    (expected,) = torch.autograd.grad(whole, logits_KV, retain_graph=True)
    place_K = torch.arange(len(tokens.completion_K))
    by_completion = [
        [tokens.completion_K == 1, (tokens.completion_K != 1) & (tokens.completion_K < 3)],
        [tokens.completion_K == 3],
    ]
    through_the_middle = [[place_K < 2], [(place_K >= 2) & (place_K < 7)], [place_K >= 7]]
    log_ratio_K = tokens.logprobs_K.detach() - tokens.old_logprobs_K
    all_sums_N = torch.zeros(len(LENGTHS)).double()
    all_sums_N.index_add_(0, tokens.completion_K, log_ratio_K)
    for ranks, reduce in ((by_completion, None), (through_the_middle, lambda _: all_sums_N)):
        parts = [replace(some(tokens, keep), reduce=reduce) for rank in ranks for keep in rank]
        found = [policy_loss(part, rl) for part in parts]
        total = sum(numerator for numerator, _ in found)
        (gradient,) = torch.autograd.grad(total, logits_KV, retain_graph=True)
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
        for name, pair in sums.items():
            torch.testing.assert_close(sum(s[name] for _, s in found), pair)


def test_denominators_add_up_over_completions():
    lengths = torch.tensor(LENGTHS)
    for mode, expected in (
        ("token-mean", 11),
        ("seq-mean-token-mean", 4),
        ("seq-mean-token-sum", 4),
        ("seq-mean-token-sum-norm", 4 * 9),
    ):
        assert loss_denominator(mode, lengths, 9) == expected
        parts = [loss_denominator(mode, part, 9) for part in lengths.split([1, 3])]
        assert sum(parts) == expected


@pytest.mark.parametrize("policy", ["clip", "gspo", "sapo", "cispo", "reinforce"])
def test_what_is_left_out_is_not_there(policy):
    """A filler position may hold anything, and a completion left out has no loss or metric."""
    rl = resolve_algorithm(RLConfig(policy_loss=policy, beta=0.1))
    theta, case = make_case()
    tokens, logits_KV = make_tokens(theta, case, rl)
    out_K = tokens.completion_K == 2
    clean = some(tokens, ~out_K)
    dirty = replace(
        clean,
        old_logprobs_K=tokens.old_logprobs_K.masked_fill(out_K, -torch.inf),
        advantages_K=tokens.advantages_K.masked_fill(out_K, torch.nan),
    )
    expected, _ = policy_loss(clean, rl)
    numerator, sums = policy_loss(dirty, rl)
    assert torch.equal(numerator, expected) and sums["kl"][1] == 6
    (gradient,) = torch.autograd.grad(numerator, logits_KV)
    assert not gradient[out_K].any() and gradient[~out_K].all()


@pytest.mark.parametrize("policy", ["clip", "gspo", "sapo", "cispo", "reinforce"])
@pytest.mark.parametrize("lengths", [[], [0, 4]])
def test_a_part_without_a_token_adds_nothing(policy, lengths):
    """A rank that holds none of a microbatch's tokens is given some other position."""
    rl = resolve_algorithm(RLConfig(policy_loss=policy, beta=0.1))
    logprobs = torch.tensor([-torch.inf], requires_grad=True)
    anything, nothing = torch.tensor([torch.nan]), torch.tensor([-1])
    tokens = Tokens(logprobs, anything, anything, nothing, torch.tensor(lengths), anything)
    numerator, sums = policy_loss(tokens, rl)
    numerator.backward()
    assert numerator == 0 and logprobs.grad.tolist() == [0.0]
    assert not any(pair.any() for pair in sums.values())
    weights = importance_weights(
        anything, anything, nothing, 0, resolve_algorithm(RLConfig(rollout_is="sequence"))
    )
    assert weights.shape == (1,)


@pytest.mark.parametrize("policy", ["clip", "gspo", "sapo", "cispo", "reinforce"])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_ratio_far_off_gives_no_nan(policy, advantage):
    logprobs = torch.tensor([-0.1, -300.0, -0.1], requires_grad=True)
    old = torch.tensor([-300.0, -0.1, -0.2])
    tokens = Tokens(
        logprobs, old, torch.full((3,), advantage), torch.tensor([0, 1, 2]), torch.ones(3), old
    )
    numerator, _ = policy_loss(tokens, resolve_algorithm(RLConfig(policy_loss=policy, beta=0.1)))
    numerator.backward()
    assert numerator.isfinite() and logprobs.grad.isfinite().all()


def test_clip_metrics_count_what_is_clipped():
    """TRL's rule: too low counts where the advantage is negative, too high where it is positive."""
    ratios, advantages = [0.5, 0.5, 1.5, 1.5, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    tokens = Tokens(
        torch.tensor(ratios).log(),
        torch.zeros(5),
        torch.tensor(advantages),
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([2, 3]),
    )
    _, sums = policy_loss(tokens, resolve_algorithm(RLConfig()))
    assert sums["clip_ratio/low_mean"].tolist() == [1, 5]
    assert sums["clip_ratio/high_mean"].tolist() == [1, 5]
    assert sums["clip_ratio/region_mean"].tolist() == [2, 5]
    sums = logprob_abs_diff(tokens, torch.tensor([0.1, -0.1, 0.0, 0.0, 0.3]))
    assert sums["train/train_rollout_logprob_abs_diff"].tolist() == pytest.approx([0.5, 5])


def test_kl_estimators_have_the_mean_they_claim():
    """Sums over a whole vocabulary are exact: k1 and k3 are unbiased, k2's gradient is the KL's,
    that of k1 is 0."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    true = (logp.exp() * (logp - ref)).sum()
    (true_gradient,) = torch.autograd.grad(true, logits, retain_graph=True)
    p = logp.exp().detach()
    means = {k: (p * kl_divergence(logp, ref, k)).sum() for k in ("k1", "k2", "k3")}
    for unbiased in ("k1", "k3"):
        torch.testing.assert_close(means[unbiased], true)
    gradients = {k: torch.autograd.grad(m, logits, retain_graph=True)[0] for k, m in means.items()}
    torch.testing.assert_close(gradients["k2"], true_gradient)
    assert gradients["k1"].abs().max() < 1e-12
    # As a reward it is the other way round: sg(k) log p has the KL's gradient for k1 alone.
    rewarded = {}
    for k in ("k1", "k3"):
        reward = kl_divergence(logp, ref, k).detach()
        (rewarded[k],) = torch.autograd.grad((p * reward * logp).sum(), logits, retain_graph=True)
    torch.testing.assert_close(rewarded["k1"], true_gradient)
    assert rewarded["k3"].norm() < 0.7 * true_gradient.norm()


def test_the_kl_of_a_reward_is_k1_unless_said():
    assert resolve_algorithm(RLConfig()).kl_estimator == "k3"
    rewarded = RLConfig(beta=0.1, use_kl_in_reward=True)
    assert resolve_algorithm(rewarded).kl_estimator == "k1"
    assert resolve_algorithm(replace(rewarded, kl_estimator="k2")).kl_estimator == "k2"
