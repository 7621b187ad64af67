"""The divergence from a teacher's next tokens: against the whole softmax, and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_mm.mimic import distillation
from megatron_mm.mimic.distillation import divergences
from megatron_mm.model.layers.output import Predictions

K, H, V, N = 5, 6, 23, 4


class Alone:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def values(dtype=torch.float64, n: int = N):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((K, H), (V, H), (K, V))
    )
    best = (2 * teacher).log_softmax(1).topk(n, 1)
    return hidden.to(dtype), weight.to(dtype), best.indices, best.values.to(dtype)


def by_softmax(hidden, weight, tokens, logprobs) -> torch.Tensor:
    """d by its definition, from whole rows."""
    s = (hidden @ weight.T).softmax(1)
    p, known = logprobs.exp(), s.gather(1, tokens)
    found = (p * (logprobs - known.log())).sum(1)
    rest, other = 1 - known.sum(1), 1 - p.sum(1)
    if tokens.shape[1] == weight.shape[0]:
        return found
    return found + other * (other / rest).log()


@pytest.mark.parametrize("n", [1, N, V])
@pytest.mark.parametrize("width", [8, 1000])
def test_it_equals_its_definition(monkeypatch, n, width):
    """In several blocks of the vocabulary and in one; with all tokens known, the whole
    divergence."""
    monkeypatch.setattr(
        distillation,
        "blocks",
        lambda _, size: [range(i, min(i + width, size)) for i in range(0, size, width)],
    )
    hidden, weight, tokens, logprobs = values(n=n)
    inputs = [[x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2)]
    found = divergences(Predictions(*inputs[0], V, Alone()), tokens, logprobs)
    expected = by_softmax(*inputs[1], tokens, logprobs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found > 0.01).all()
    scales = torch.arange(1.0, K + 1, dtype=torch.float64)
    (found * scales).sum().backward()
    (expected * scales).sum().backward()
    for one, other in zip(*inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9)


def test_finite_differences():
    hidden, weight, tokens, logprobs = values()
    hidden.requires_grad_(), weight.requires_grad_()

    def of(hidden, weight):
        return divergences(Predictions(hidden, weight, V, Alone()), tokens, logprobs)

    assert torch.autograd.gradcheck(of, (hidden, weight))


def test_the_students_own_tokens_teach_nothing():
    hidden, weight, *_ = values(torch.float32)
    best = (hidden @ weight.T).log_softmax(1).topk(N, 1)
    hidden.requires_grad_(), weight.requires_grad_()
    found = divergences(Predictions(hidden, weight, V, Alone()), best.indices, best.values)
    found.sum().backward()
    # Rounding of fp32 sums of 23 terms.
    assert found.abs().max() <= 1e-6 and hidden.grad.abs().max() <= 1e-6
    assert weight.grad.abs().max() <= 1e-6


def test_positions_without_a_teacher_have_finite_gradients():
    """Zeros stand there; the loss weighs them with 0."""
    hidden, weight, tokens, logprobs = values(torch.float32)
    tokens[0], logprobs[0] = 0, 0.0
    hidden.requires_grad_()
    mask = torch.tensor([0.0, 1, 1, 1, 1])
    (divergences(Predictions(hidden, weight, V, Alone()), tokens, logprobs) * mask).sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[0] == 0).all()


def on_rank_divergence() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The divergence of a vocabulary that two ranks share, with a row of padding on the last."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, tokens, logprobs = values()
    rows = -(-V // size)
    whole = torch.cat((weight, torch.full((rows * size - V, H), 7.0, dtype=weight.dtype)))
    mine = whole[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    held = min(rows, V - rank * rows)
    hidden.requires_grad_()
    found = divergences(Predictions(hidden, mine, held, dist.group.WORLD), tokens, logprobs)
    found.sum().backward()
    return found.detach(), hidden.grad, mine.grad[:held]


def test_a_vocabulary_on_two_ranks(ranks):
    hidden, weight, tokens, logprobs = values()
    hidden.requires_grad_(), weight.requires_grad_()
    expected = by_softmax(hidden, weight, tokens, logprobs)
    expected.sum().backward()
    (found, of_hidden, of_weight), (again, more_hidden, more_weight) = ranks(2, on_rank_divergence)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(found, again)
    torch.testing.assert_close(of_hidden + more_hidden, hidden.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        torch.cat((of_weight, more_weight)), weight.grad, rtol=1e-8, atol=1e-9
    )
