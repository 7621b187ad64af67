"""Drawn tokens: reproducible, distributed as they should be, narrowed as asked."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from megatron_mm.earl.router_term import drawn_log_probability
from megatron_mm.generation.sampling import Sampling, draw, gumbels, uniforms

N = 40000


def drawn(logits, seed=0, **settings):
    rows = torch.arange(N)
    sampling = Sampling((), 1, seed=seed, **settings)
    tokens, logprobs = draw(
        logits.expand(N, -1), sampling, uniforms(seed, rows, torch.zeros_like(rows))
    )
    return tokens, logprobs


LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.5, -4.0, 2.0, -torch.inf])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_are_likely(temperature):
    tokens, logprobs = drawn(LOGITS, temperature=temperature)
    probs = (LOGITS / temperature).softmax(0)
    share = torch.bincount(tokens, minlength=7) / N
    # Five standard deviations of a share of 40,000 draws.
    assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / N).sqrt() + 1e-9).all()
    assert torch.allclose(logprobs, probs.log()[tokens], atol=1e-6)


def test_greedy_takes_the_lowest_of_equals():
    tokens, logprobs = drawn(LOGITS, temperature=0.0)
    assert (tokens == 2).all()
    assert torch.allclose(logprobs, LOGITS.log_softmax(0)[2].expand(N))


def test_top_k_and_top_p_narrow_the_draw_but_not_the_log_probability():
    tokens, logprobs = drawn(LOGITS, top_k=3)
    assert set(tokens.tolist()) == {2, 3, 5}
    assert torch.allclose(logprobs, LOGITS.log_softmax(0)[tokens], atol=1e-6)
    probs = LOGITS.softmax(0)
    assert 0.6 < probs[2] + probs[5] < 0.75 < probs[[2, 3, 5]].sum()
    assert set(drawn(LOGITS, top_p=0.75)[0].tolist()) == {2, 3, 5}
    assert set(drawn(LOGITS, top_p=0.6)[0].tolist()) == {2, 5}
    assert set(drawn(LOGITS, top_p=1e-9)[0].tolist()) == {2}  # the first of equals
    # Of the narrowed ones the shares are in proportion.
    tokens, _ = drawn(LOGITS, top_p=0.75)
    expected = probs[3] / probs[[2, 3, 5]].sum()
    assert abs(float((tokens == 3).double().mean()) - float(expected)) <= 0.012


def test_numbers_depend_on_seed_row_and_step_only():
    rows, steps = torch.arange(1000).repeat(3), torch.arange(3).repeat_interleave(1000)
    whole = uniforms(5, rows, steps)
    some = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(uniforms(5, rows[some], steps[some]), whole[some])
    assert len(whole.unique()) == 3000 and whole.min() >= 0 and whole.max() < 1
    assert not torch.equal(uniforms(6, rows, steps), whole)
    # Neither neighbouring rows nor neighbouring steps go together: 5 / sqrt(1000).
    table = whole.view(3, 1000)
    for a, b in ((table[0, 1:], table[0, :-1]), (table[1], table[0]), (table[2], table[1])):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) <= 0.16
    assert abs(float(whole.mean()) - 0.5) <= 5 * (12 * 3000) ** -0.5


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens, _ = draw(logits, Sampling((), 1), ends)
    assert tokens.tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_experts_come_in_an_order_as_often_as_it_is_likely(temperature):
    """The two best of logits with noise, against drawing twice without replacement."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.5])
    rows, places = torch.arange(N), torch.arange(8, 12)
    noise = gumbels(5, rows, torch.zeros_like(rows), places) * temperature
    best = (logits + noise).topk(2, dim=1).indices
    ways = torch.tensor(list(permutations(range(4), 2)))
    expected = drawn_log_probability(logits.expand(len(ways), -1), ways, temperature).exp()
    share = (best.unsqueeze(1) == ways).all(2).double().mean(0)
    # Five standard deviations of a share of 40,000 draws.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / N).sqrt()).all()


def test_noise_depends_on_seed_row_step_and_place_only():
    rows, steps = torch.arange(100).repeat(3), torch.arange(3).repeat_interleave(100)
    whole = gumbels(5, rows, steps, torch.arange(40))
    some = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:50]
    assert torch.equal(
        gumbels(5, rows[some], steps[some], torch.tensor([7, 30])), whole[some][:, [7, 30]]
    )
    assert not torch.equal(gumbels(6, rows, steps, torch.arange(40)), whole)
    assert whole.isfinite().all() and len(whole.unique()) > 11_900  # of 12,000 in fp32
    # Neighbouring places and the row's own token number do not go together: 5 / sqrt(300).
    token = uniforms(5, rows, steps)
    for a, b in ((whole[:, 0], whole[:, 1]), (whole[:, 0].double(), token)):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) <= 0.29
