"""Each loss against a slow loop over pairs and tokens, its slopes against finite differences, and
the gradient of the objective against autograd of the loss itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_mm.generation.answers import answered
from megatron_mm.preference.batch import preference_batch
from megatron_mm.preference.losses import Pairs
from megatron_mm.preference.objective import PreferenceObjective
from megatron_mm.preference.settings import PREFERENCE_LOSSES, DPOConfig
from megatron_mm.report.metrics import MUTED, Metrics, own_totals, reduced
from megatron_mm.rl.completion_batch import completion_batch

LENGTHS = [5, 3, 1, 7, 4, 4]  # chosen and rejected by turns
DELTA = 0.05
DPO = DPOConfig(dpo_beta=0.3, dpo_label_smoothing=0.1)
NAMES = list(PREFERENCE_LOSSES)


def tokens_logps(seed: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(-2 * torch.rand(n, generator=generator)).tolist() for n in LENGTHS]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def slow(name: str, policy: list[list[float]], reference: list[list[float]]) -> list[float]:
    """The losses, pair by pair and token by token, in the formulas of TRL's trainer."""
    beta, share, found = 0.3, 0.1, []
    for pair in range(len(policy) // 2):
        total, against = [0.0, 0.0], [0.0, 0.0]
        for side in (0, 1):
            for own, other in zip(policy[2 * pair + side], reference[2 * pair + side], strict=True):
                total[side] += own
                against[side] += other
        count = [len(policy[2 * pair + side]) for side in (0, 1)]
        c, r = total[0] - against[0], total[1] - against[1]
        gap = beta * (c - r)
        sig = 1 / (1 + math.exp(-beta * c)), 1 / (1 + math.exp(-beta * r))
        found.append(
            {
                "sigmoid": -(1 - share) * log_sigmoid(gap) - share * log_sigmoid(-gap),
                "hinge": max(0.0, 1 - gap),
                "robust": ((share - 1) * log_sigmoid(gap) + share * log_sigmoid(-gap))
                / (1 - 2 * share),
                "ipo": (c / count[0] - r / count[1] - 1 / (2 * beta)) ** 2,
                "bco_pair": -log_sigmoid(beta * c - DELTA) - log_sigmoid(DELTA - beta * r),
                "apo_zero": 1 - sig[0] + sig[1],
                "apo_down": sig[0] + 1 - 1 / (1 + math.exp(-gap)),
                "sppo_hard": (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
                "nca_pair": -log_sigmoid(beta * c)
                - 0.5 * log_sigmoid(-beta * c)
                - 0.5 * log_sigmoid(-beta * r),
                "sft": -total[0] / count[0],
            }[name]
        )
    return found


def pairs_of(policy: list[list[float]], reference: list[list[float]]) -> Pairs:
    def sums(logps):
        return torch.tensor([sum(own) for own in logps], dtype=torch.float64)

    return Pairs(sums(policy), sums(reference), torch.tensor(LENGTHS), DELTA)


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_equals_a_slow_loop(name):
    policy, reference = tokens_logps(1), tokens_logps(2)
    found = PREFERENCE_LOSSES[name](pairs_of(policy, reference), DPO).tolist()
    assert found == pytest.approx(slow(name, policy, reference), rel=1e-12)  # fp64 sums


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_finite_differences(name):
    pairs = pairs_of(tokens_logps(1), tokens_logps(2))

    def loss(sums_N):
        return PREFERENCE_LOSSES[name](
            Pairs(sums_N, pairs.ref_logps_N, pairs.lengths_N, DELTA), DPO
        ).sum()

    # Central differences in fp64: off by the step squared, 1e-10, and by rounding over the step.
    assert torch.autograd.gradcheck(
        loss, pairs.logps_N.clone().requires_grad_(), eps=1e-5, atol=1e-8, rtol=1e-6
    )


AT_START = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "robust": math.log(2),
    "ipo": 1 / (4 * 0.1**2),
    "bco_pair": 2 * math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo_hard": 2 / (4 * 0.1**2),
    "nca_pair": 2 * math.log(2),
}


@pytest.mark.parametrize("name", list(AT_START))
def test_losses_where_policy_and_reference_agree(name):
    """With the default beta of 0.1."""
    same = pairs_of(tokens_logps(1), tokens_logps(1))
    found = PREFERENCE_LOSSES[name](
        Pairs(same.logps_N, same.ref_logps_N, same.lengths_N), DPOConfig()
    )
    assert found.tolist() == pytest.approx([AT_START[name]] * 3, rel=1e-12)


class Scored:
    """Predictions whose log-probabilities are given."""

    device = torch.device("cpu")

    def __init__(self, logprobs_K: torch.Tensor):
        self.given = logprobs_K

    def logprobs(self, labels_K: torch.Tensor) -> torch.Tensor:
        return self.given


class OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


ALONE = SimpleNamespace(cp=OneRank())


def batch_of_pairs(seed: int):
    from megatron_mm.data.sample import Sample

    prompt = Sample(torch.arange(4), torch.arange(4), torch.zeros(4), [], "rows:1")
    samples = [answered(prompt, torch.arange(n), None) for n in LENGTHS]
    batch = completion_batch(samples, range(6), settings=None, pad_id=0, pad_multiple=16)
    whole_T = batch.spread([torch.tensor(own) for own in tokens_logps(seed)])
    return preference_batch(batch, whole_T, DELTA)


@pytest.mark.parametrize("losses", [*([name] for name in NAMES), ["sigmoid", "bco_pair", "sft"]])
def test_the_gradient_is_that_of_the_loss_itself(losses):
    weights = [0.8, 0.2, 1.0][: len(losses)]
    dpo = DPOConfig(losses, weights, dpo_beta=0.3, dpo_label_smoothing=0.1)
    batch, metrics = batch_of_pairs(2), Metrics()
    start = torch.cat([torch.tensor(own) for own in tokens_logps(1)])
    given = start.clone().requires_grad_()
    positions = PreferenceObjective(dpo).positions(batch)
    total, count = PreferenceObjective(dpo).loss(Scored(given), batch, positions, ALONE, metrics)
    total.backward()
    direct = start.double().requires_grad_()
    sums_N = torch.stack([part.sum() for part in direct.split(LENGTHS)])
    pairs = Pairs(sums_N, batch.ref_logps_N, batch.lengths_N, DELTA)
    expected = sum(
        weight * PREFERENCE_LOSSES[name](pairs, dpo).sum()
        for name, weight in zip(losses, weights, strict=True)
    )
    expected.backward()
    assert int(count) == 3 and count.dtype == torch.int32
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)  # fp32
    torch.testing.assert_close(given.grad, direct.grad.float(), rtol=1e-6, atol=1e-9)  # fp32
    found = reduced([own_totals([metrics])[0]])
    assert found["train/dpo_loss"] == pytest.approx(float(expected.detach()) / 3, rel=1e-9)
    ratios = (sums_N - batch.ref_logps_N).detach()
    assert found["rewards/margins"] == pytest.approx(
        float(0.3 * (ratios[0::2] - ratios[1::2]).mean()), rel=1e-9
    )
    assert found["rewards/accuracies"] == pytest.approx(
        float((ratios[0::2] > ratios[1::2]).double().mean())
    )
    assert found["logps/chosen"] == pytest.approx(float(sums_N.detach()[0::2].mean()), rel=1e-9)
    assert found["train/pairs"] == 3


def test_a_microbatch_of_padding_has_no_loss():
    dpo = DPOConfig(["mpo"])
    batch = completion_batch([], [], settings=None, pad_id=0, pad_multiple=8)
    batch = preference_batch(batch, torch.zeros(8), 0.0)
    given = torch.full((1,), -torch.inf, requires_grad=True)  # a position of no answer
    objective = PreferenceObjective(dpo)
    total, count = objective.loss(Scored(given), batch, torch.tensor([0]), ALONE, MUTED)
    total.backward()
    assert float(total.detach()) == 0 and int(count) == 0 and given.grad.tolist() == [0]
    assert float(batch.loss_weight) == 0 and float(batch_of_pairs(1).loss_weight) == 3


def test_losses_of_one_name_have_metrics_of_their_own():
    losses = ["sigmoid", "mine.sigmoid", "mine.dpo", "other.dpo"]
    objective = PreferenceObjective(DPOConfig(loss_type=losses, loss_weights=[1.0] * 4))
    # train/dpo_loss is the sum of all.
    assert [*objective._names.values()] == ["sigmoid", "sigmoid_2", "dpo_2", "dpo_3"]
