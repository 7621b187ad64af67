"""The gated delta rule against its own equation, and samples kept apart in the whole layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from megatron_mm.model.backends.choice import choose
from megatron_mm.model.core_config import language_config
from megatron_mm.model.layers.gdn.convolution import stream_conv
from megatron_mm.model.layers.gdn.delta_rule import gated_delta_rule
from megatron_mm.model.layers.gdn.layer import GatedDeltaNet
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.param_layout import initialize
from support.batches import small_run
from support.samples import relative

LENGTHS = [1, 5, 63, 64, 65, 150]  # one position, one chunk less, exact and more, several
# fp32 (6e-8 a rounding) through up to 150 dependent updates; measured up to 1.3e-6,
# and transformers' kernel is as far from the recurrence (1.6e-6).
TOLERANCE = 1e-5
# fp64: measured up to 3e-15.
DOUBLE_TOLERANCE = 1e-12


def recurrent(query, key, value, log_decay, beta):
    """S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T,  o_t = S_t^T q_t, as written."""
    rows, length, heads, width = key.shape
    q = query / (query.square().sum(-1, keepdim=True) + 1e-6).sqrt() / width**0.5
    k = key / (key.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    out = []
    for n in range(rows):
        per_head = []
        for h in range(heads):
            state = key.new_zeros(width, value.shape[-1])
            steps = []
            for t in range(length):
                state = log_decay[n, t, h].exp() * state
                error = value[n, t, h] - state.T @ k[n, t, h]
                state = state + beta[n, t, h] * torch.outer(k[n, t, h], error)
                steps.append(state.T @ q[n, t, h])
            per_head.append(torch.stack(steps))
        out.append(torch.stack(per_head, dim=1))
    return torch.stack(out)


def inputs(length: int, strongest: float = -3.0, rows: int = 2, heads: int = 2):
    """fp64 leaves: query, key [.., 8], value [.., 12], log decay in (strongest, 0), beta."""
    g = torch.Generator().manual_seed(length)

    def draw(make, *shape):
        return make(rows, length, heads, *shape, generator=g, dtype=torch.float64)

    made = [draw(torch.randn, 8), draw(torch.randn, 8), draw(torch.randn, 12)]
    # squared: most decays are weak, so that what is far away matters
    made += [strongest * draw(torch.rand).square(), draw(torch.rand)]
    return [x.requires_grad_() for x in made]


def backward(function, args, **keywords):
    """Output and the gradients of a random projection of it."""
    out = function(*args, **keywords)
    out = out[0] if isinstance(out, tuple) else out
    g = torch.Generator().manual_seed(99)
    direction = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * direction).sum(), args)]


NAMES = ("output", "query", "key", "value", "log_decay", "beta")


def compare(found, expected, tolerance, length):
    # At length 1 no decay has anything to decay: both gradients are exactly zero.
    for name, a, b in zip(NAMES, found, expected, strict=True):
        if name == "log_decay" and length == 1:
            assert not a.any() and not b.any()
            continue
        assert relative(a.double(), b.double()) <= tolerance, name


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_recurrence(length):
    args = inputs(length)
    narrow = [x.detach().float().requires_grad_() for x in args]
    compare(backward(gated_delta_rule, narrow), backward(recurrent, args), TOLERANCE, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_recurrence_in_double_precision(double, length):
    args = inputs(length)
    expected = backward(recurrent, args)
    compare(backward(gated_delta_rule, args), expected, DOUBLE_TOLERANCE, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_transformers(length):
    args = [x.detach().float().requires_grad_() for x in inputs(length)]
    theirs = backward(torch_chunk_gated_delta_rule, args, use_qk_l2norm_in_kernel=True)
    compare(backward(gated_delta_rule, args), theirs, TOLERANCE, length)


def strong_decays(kind: str, length: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(length)
    draws = -30 * torch.rand(2, length, 2, generator=g, dtype=torch.float64)
    if kind == "all":
        return draws.clamp(max=-29)
    if kind == "some":
        return torch.where(draws < -27, draws, draws / 100)
    return torch.zeros_like(draws)


@pytest.mark.parametrize("length", [5, 64, 150])
@pytest.mark.parametrize("kind", ["all", "some", "none"])
def test_strong_decays(kind, length):
    """exp(-30 * 64) is 0 in fp32 and its inverse is infinite; neither may spoil anything."""
    args = inputs(length)
    args[3] = strong_decays(kind, length).requires_grad_()
    narrow = [x.detach().float().requires_grad_() for x in args]
    found = backward(gated_delta_rule, narrow)
    assert all(x.isfinite().all() for x in found)
    for name, a, b in zip(NAMES, found, backward(recurrent, args), strict=True):
        # A decay is the difference of two sums that here reach a few hundred, where fp32 steps
        # by 3e-5; measured up to 6e-6, and the same in transformers. The gradient of a decay
        # of e^-29 is itself 1e-13: an absolute error counts there, hence the 1e-3.
        error = (a.double() - b).norm() / (b.norm() + 1e-3)
        assert error <= 5e-5, (name, float(error))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length", [1, 3, 4, 17])
def test_causal_conv_is_torchs(length, width):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, length, 10, generator=g, requires_grad=True)
    weight = torch.randn(10, width, generator=g, requires_grad=True)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    expected = F.silu(F.conv1d(padded, weight.unsqueeze(1), groups=10)).transpose(1, 2)
    found = stream_conv(x.flatten(0, 1), weight, (x.shape[1],) * len(x)).view_as(x)
    direction = torch.randn(found.shape, generator=g)
    ours = torch.autograd.grad((found * direction).sum(), (x, weight))
    theirs = torch.autograd.grad((expected * direction).sum(), (x, weight))
    # Sums of at most 51 products in fp32 in another order.
    for a, b in zip((found, *ours), (expected, *theirs), strict=True):
        assert relative(a, b) <= 1e-6


@pytest.fixture(scope="module")
def layer(pg):
    run = small_run()
    config, backend = language_config(run), choose(run.backend)
    made = GatedDeltaNet(run.model.language, config, pg, out_std=0.1, backend=backend)
    initialize(made, seed=3)
    with torch.no_grad():  # slow decays: a state that is not reset is seen from far away
        made.A_log.fill_(-5.0)
    return made.requires_grad_(False)


@pytest.mark.parametrize("lengths", [(9, 7), (7, 9), (8, 8), (70, 66), (1, 5, 2)])
def test_every_sample_starts_afresh(layer, lengths):
    """In the whole layer, convolution included, changing all of one sample changes not a bit
    of any other, and each sample is what it is alone."""
    segments = Segments.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(segments.total, 1, 64, generator=g)
    out = layer(hidden, segments)
    for i, (start, length) in enumerate(zip(segments.starts, lengths, strict=True)):
        here = torch.zeros(segments.total, dtype=torch.bool)
        here[start : start + length] = True
        changed = hidden.clone()
        changed[here] = torch.randn(length, 1, 64, generator=g)
        moved = (layer(changed, segments) != out).flatten(1).any(1)
        assert torch.equal(moved, here), f"sample {i}"
        alone = layer(hidden[here], Segments.from_cu_seqlens(torch.tensor([0, length])))
        # Alone it has another rectangle, chunked otherwise: fp32 rounding, measured 4e-7.
        assert relative(out[here], alone) <= 5e-6


def test_the_layer_is_causal_and_remembers(layer):
    """A changed position changes every later one of its sample, however far, and no earlier."""
    segments = Segments.from_cu_seqlens(torch.tensor([0, 90]))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(90, 1, 64, generator=g)
    changed = hidden.clone()
    changed[10] += 1.0
    moved = (layer(changed, segments) != layer(hidden, segments)).flatten(1).any(1)
    assert torch.equal(moved, torch.arange(90) >= 10)
