"""Samples packed into one stream know nothing of each other, in the whole model with CLVR."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_mm.model.multimodal import build
from support.batches import small_run, two_memories
from support.samples import Sample, pack, relative, sample
from support.weights import looks_off_zero

# In double precision, so that leaking is told from rounding: packing changes the shapes of
# matrix products and with them the order of sums. Measured up to 1e-15 (logits), 2e-14
# (gradients; in fp32 the worst one, of A_log, is 1e-5, all of it rounding).
DOUBLE_TOLERANCE = 1e-12


def run_and_samples(router: str = "fp64", **fusion):
    run = small_run(**fusion)
    run.model.language.moe_router_dtype = router
    images = [(), (1, 3), (2,), (), (3,)]
    samples = [sample(run.model, i, tiles, text=5 + i) for i, tiles in enumerate(images)]
    return run, samples


def per_sample(x: torch.Tensor, batch) -> list[torch.Tensor]:
    real = x[: batch.num_real_tokens]
    lengths = batch.cu_seqlens[batch.cu_seqlens <= batch.num_real_tokens].diff()
    return list(real.split(lengths.tolist()))


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(batch).logits()
    losses = F.cross_entropy(logits, batch.labels_T, reduction="none")
    (losses * batch.loss_mask_T).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def worst(ours: dict, theirs: dict) -> tuple[float, str]:
    errors = {
        n: float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)) for n in theirs
    }
    name = max(errors, key=errors.get)
    return errors[name], name


@torch.no_grad()
def test_logits_in_fp32(pg):
    run, samples = run_and_samples("fp32")
    model = looks_off_zero(build(run, pg)[0]).eval()
    batch = pack(run.model, samples)
    found = [
        relative(a, model(pack(run.model, [s])).logits())
        for a, s in zip(per_sample(model(batch).logits(), batch), samples, strict=True)
    ]
    # A few hundred fp32 roundings of 6e-8, in another order; measured up to 6e-7.
    assert max(found) <= 2e-6, found


@pytest.mark.parametrize("fusion", [{}, two_memories("detail", "overview")], ids=["one", "two"])
def test_logits_and_gradients_equal_those_of_the_samples_alone(pg, double, fusion):
    run, samples = run_and_samples(**fusion)
    # eval: the balancing loss is one of the whole microbatch, so it is not a sum over samples
    model = looks_off_zero(build(run, pg)[0]).eval()
    batch = pack(run.model, samples)
    logits, gradients = loss_and_gradients(model, batch)
    total = {}
    for mine, s in zip(per_sample(logits, batch), samples, strict=True):
        alone, parts = loss_and_gradients(model, pack(run.model, [s]))
        assert relative(mine, alone) <= DOUBLE_TOLERANCE
        total = {n: total.get(n, 0) + g for n, g in parts.items()}
    assert all(g.any() for g in total.values()), [n for n, g in total.items() if not g.any()]
    error, name = worst(gradients, total)
    assert error <= DOUBLE_TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("multiple", [16, 512])
def test_a_padding_tail_changes_nothing(pg, double, multiple):
    """In training mode with a strong balancing loss, from which padding must be left out too;
    at 512 the tail is the longest segment of all."""
    run, samples = run_and_samples()
    run.model.language.moe_aux_loss_coeff = 1.0
    model = looks_off_zero(build(run, pg)[0]).train()
    plain, padded = pack(run.model, samples), pack(run.model, samples, multiple)
    assert len(padded.tokens_T) % multiple == 0 and len(padded.tokens_T) > len(plain.tokens_T)
    logits, gradients = loss_and_gradients(model, plain)
    found, with_tail = loss_and_gradients(model, padded)
    assert relative(found[: plain.num_real_tokens], logits) <= DOUBLE_TOLERANCE
    error, name = worst(with_tail, gradients)
    assert error <= DOUBLE_TOLERANCE, f"{name}: {error:.1e}"
    # The balancing loss did take part.
    _, without = loss_and_gradients(model.eval(), plain)
    assert worst(without, gradients)[0] > 1e-3


def other_text(s: Sample) -> Sample:
    taken = set(s.stream_positions)
    moved = [t if i in taken else (t + 1) % 90 for i, t in enumerate(s.tokens)]
    return replace(s, tokens=moved)


def other_image(s: Sample) -> Sample:
    return replace(s, pixels=s.pixels ^ 64)


@pytest.mark.parametrize(
    ("change", "which"),
    [(other_text, i) for i in range(5)] + [(other_image, i) for i in (1, 2, 4)],
)
@torch.no_grad()
def test_no_sample_sees_another(pg, double, change, which):
    run, samples = run_and_samples()
    model = looks_off_zero(build(run, pg)[0]).eval()
    changed = [change(s) if i == which else s for i, s in enumerate(samples)]
    before, after = (pack(run.model, x) for x in (samples, changed))
    pairs = zip(*(per_sample(model(x).logits(), x) for x in (before, after)), strict=True)
    for i, (a, b) in enumerate(pairs):
        if i == which:
            assert relative(b, a) > 1e-2
        else:
            assert relative(b, a) <= DOUBLE_TOLERANCE, f"sample {i}"
