"""Fused linear cross entropy against the softmax of whole logits."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_mm.model.layers import cross_entropy
from megatron_mm.model.layers.cross_entropy import Softmax, blocks, linear_logprobs

K, H, V, PADDING = 9, 16, 77, 3
ASKED = {"logprob": (1, 0), "entropy": (0, 1), "both": (1, 1)}


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 16 tokens: five, the last of 13 or, with padding, five of 16."""
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "WIDTH_MULTIPLE", 16)


def given(dtype=torch.float32, padding: int = 0, rows: int = K):
    """Hidden states, weight and labels; the first and the last token are among the labels."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, H, generator=generator).to(dtype)
    weight = torch.randn(V + padding, H, generator=generator).to(dtype)
    labels = torch.randint(0, V, (rows,), generator=generator)
    labels[:2] = torch.tensor([0, V - 1])[:rows]
    if padding:
        weight[V:] = 7.0  # whatever stands there must not count
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def weighted(logprobs, entropies, asked) -> torch.Tensor:
    """A scalar with another gradient in every row."""
    terms = []
    for values, wanted, power in zip((logprobs, entropies), asked, (1.0, 0.5), strict=True):
        if wanted:
            weights = torch.linspace(-1, 2, len(values), dtype=values.dtype)
            terms.append((weights.abs() ** power * weights.sign() * values).sum())
    return sum(terms)


def expected(hidden, weight, labels, temperature, asked):
    """Log-probabilities, entropies and gradients, from fp64 logits of the real tokens."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    there = torch.distributions.Categorical(logits=hidden @ weight[:V].t() / temperature)
    logprobs, entropies = there.log_prob(labels), there.entropy()
    weighted(logprobs, entropies, asked).backward()
    return logprobs.detach(), entropies.detach(), hidden.grad, weight.grad


def fused(pg, hidden, weight, labels, temperature, asked):
    softmax = Softmax(temperature, V, pg.tp)
    found = linear_logprobs(hidden, weight, labels, softmax, entropy=bool(asked[1]))
    weighted(*found, asked).backward()
    return *found, hidden.grad, weight.grad


def relative(found, wanted) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("padding", [0, PADDING])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("width", ["one block", "blocks"])
def test_it_is_the_softmax_of_the_logits(pg, request, width, asked, padding, temperature):
    if width == "blocks":
        request.getfixturevalue("short_blocks")
        assert [len(block) for block in blocks(K, V)] == [16, 16, 16, 16, 13]
    inputs = given(padding=padding)
    found = fused(pg, *inputs, temperature, ASKED[asked])
    wanted = expected(*inputs, temperature, ASKED[asked])
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is None:  # an entropy that was not asked for
            assert asked == "logprob"
            continue
        # A few roundings of fp32, 6e-8 each, of logits of up to 50; 1e-6 was measured.
        assert ours.dtype is torch.float32 and relative(ours, theirs) <= 3e-6
    assert not found[3][V:].any()  # the gradient of padding is 0 to the bit


@pytest.mark.parametrize("asked", ASKED)
def test_gradients_in_fp64(pg, short_blocks, asked):
    """By finite differences; padding and a short last block take part."""
    *both, labels = given(torch.float64, PADDING, rows=3)
    hidden, weight = (x.detach()[:, :3].clone().requires_grad_() for x in both)

    def function(hidden, weight):
        found = linear_logprobs(hidden, weight, labels, Softmax(0.7, V, pg.tp), entropy=True)
        return [values for values, wanted in zip(found, ASKED[asked], strict=True) if wanted]

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_block_has_the_bits_of_whole_logits(pg, dtype, temperature):
    """One block gives megatron-core's cross entropy and its gradients, to the bit."""
    ours, theirs = given(dtype), given(dtype)
    logprobs, entropies, *gradients = fused(pg, *ours, temperature, ASKED["logprob"])
    hidden, weight, labels = theirs
    logits = (hidden @ weight.t()).float() / temperature
    losses = vocab_parallel_cross_entropy(logits[:, None], labels[:, None], tp_group=pg.tp)
    weighted(-losses.squeeze(1), None, ASKED["logprob"]).backward()
    assert torch.equal(logprobs, -losses.squeeze(1)) and entropies is None
    assert torch.equal(gradients[0], hidden.grad) and torch.equal(gradients[1], weight.grad)


@pytest.mark.parametrize("asked", ASKED)
def test_in_bf16_blocks_lose_nothing(pg, monkeypatch, asked):
    """Softmax and the sum of the gradient over blocks are in fp32: blocks are as far from fp64 as
    one block is, up to a fifth. In both, logits of up to 16 are rounded to bf16, by up to 2^-5."""
    wanted = expected(*given(torch.bfloat16), 0.7, ASKED[asked])
    one = fused(pg, *given(torch.bfloat16), 0.7, ASKED[asked])
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 0)
    monkeypatch.setattr(cross_entropy, "WIDTH_MULTIPLE", 16)
    many = fused(pg, *given(torch.bfloat16), 0.7, ASKED[asked])
    for a, b, truth in zip(one, many, wanted, strict=True):
        if a is not None:
            assert relative(b, truth) <= 1.2 * relative(a, truth)
            assert relative(a, truth) < 2**-5


def test_no_positions(pg, short_blocks):
    """A rank may hold no position that counts."""
    found = fused(pg, *given(rows=0), 0.7, ASKED["both"])
    assert [len(values) for values in found[:3]] == [0, 0, 0]
    assert found[3].shape == (V, H) and not found[3].any()


@pytest.mark.parametrize("width", ["one block", "blocks"])
def test_what_is_frozen_gets_no_gradient(pg, request, width):
    if width == "blocks":
        request.getfixturevalue("short_blocks")
    for frozen in (0, 1):
        inputs, whole = given(), given()
        inputs[frozen].requires_grad_(False)
        found, wanted = (fused(pg, *x, 0.7, ASKED["both"]) for x in (inputs, whole))
        assert found[2 + frozen] is None
        assert torch.equal(found[3 - frozen], wanted[3 - frozen])


def test_without_gradients(pg, short_blocks):
    hidden, weight, labels = given()
    softmax = Softmax(0.7, V, pg.tp)
    with torch.no_grad():
        logprobs, _ = linear_logprobs(hidden, weight, labels, softmax, entropy=False)
    again, _ = linear_logprobs(hidden, weight, labels, softmax, entropy=False)
    assert not logprobs.requires_grad and torch.equal(logprobs, again)


def test_a_number_that_is_not_finite_is_seen(pg, short_blocks):
    hidden, weight, labels = given()
    with torch.no_grad():
        hidden[4, 3] = torch.nan
    logprobs, entropies, *_ = fused(pg, hidden, weight, labels, 1.0, ASKED["both"])
    assert logprobs.isnan().nonzero().tolist() == [[4]] == entropies.isnan().nonzero().tolist()


@pytest.mark.parametrize("size", [151_936, 75_968, 331, 1])
@pytest.mark.parametrize("positions", [0, 1, 8_192, 131_072])
def test_blocks_cover_the_slice_within_the_budget(positions, size):
    cut = blocks(positions, size)
    assert [token for block in cut for token in block] == list(range(size))
    assert all(len(block) % 128 == 0 for block in cut[:-1])
    assert all(4 * positions * len(block) <= 2**27 for block in cut)
