"""Loss and gradient do not depend on how tokens lie on ranks: real gloo ranks, fp32."""

import pytest
import torch
import torch.distributed as dist

from megatron_mm.rl.algorithms import ALGORITHMS
from megatron_mm.rl.policy_losses import Tokens, loss_denominator, policy_loss
from megatron_mm.rl.settings import RLConfig, resolve_algorithm

LENGTHS = [5, 3, 9, 1, 6, 8]


def problem():
    generator = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    rows = [torch.randn(total, generator=generator) * 0.5 - 1 for _ in range(3)]
    completion = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return *rows, torch.randn(len(LENGTHS), generator=generator)[completion], completion


def on_a_rank(layout, algorithm):
    """Returns loss and gradient of the minibatch. With "dp" each rank holds whole completions in
    two microbatches; with "cp" completions are cut where ranks meet."""
    rl = resolve_algorithm(RLConfig(algorithm=algorithm, beta=0.1))
    rank, size = dist.get_rank(), dist.get_world_size()
    logprobs, old, ref, advantages, completion = problem()
    logprobs.requires_grad_()
    place = torch.arange(len(completion))
    if layout == "cp":
        parts = [(place * size // len(place)) == rank]
    else:
        mine = completion % size == rank
        parts = [mine & (completion < 2), mine & (completion >= 2)]

    def reduce(sums_N):
        dist.all_reduce(sums_N)
        return sums_N

    total = torch.zeros(())
    for here in parts:
        tokens = Tokens(
            logprobs[here],
            old[here],
            advantages[here],
            completion[here],
            torch.tensor(LENGTHS),
            ref[here],
            reduce=reduce if layout == "cp" else None,
        )
        numerator, _ = policy_loss(tokens, rl)
        numerator.backward()
        total += numerator.detach()
    for tensor in (total, logprobs.grad):
        dist.all_reduce(tensor)
    divisor = loss_denominator(rl.loss_agg_mode, torch.tensor(LENGTHS), rl.max_completion_length)
    return total / divisor, logprobs.grad / divisor


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_loss_and_gradient_are_those_of_one_rank(ranks, algorithm):
    ((loss, gradient),) = ranks(1, on_a_rank, "dp", algorithm)
    for layout in ("dp", "cp"):
        for found, found_gradient in ranks(2, on_a_rank, layout, algorithm):
            # fp32 sums in another order
            torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-7)
            assert (found_gradient - gradient).norm() <= 1e-6 * gradient.norm()
