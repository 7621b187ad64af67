"""Streams to rectangles and back."""

import math

import pytest
import torch

from megatron_mm.model import segments as module
from megatron_mm.model.layers.attention import causal_attention
from megatron_mm.model.segments import Buckets, Segments, similar

LENGTHS = [(3,), (2, 2), (4, 1, 2), (0, 3), (3, 0, 0, 2), (1, 1)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("spare", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("split", [False, True])
def test_there_and_back(lengths, spare, split):
    """`spare` rows belong to no sample, as in a padded memory; a sample may have none."""
    count = torch.tensor(lengths)
    total = sum(lengths) + spare
    segments = Segments(count.cumsum(0) - count, count, max(1, *lengths, 1), total)
    x = torch.arange(1.0, total + 1)[:, None].expand(-1, 3)
    groups = [torch.arange(len(lengths))]
    if split:  # each sample alone, the last one first
        groups = [torch.tensor([n]) for n in reversed(range(len(lengths))) if lengths[n]]
    parts = [segments.pick(group) for group in groups]
    rectangles = [part.to_rectangle(x) for part in parts]
    for group, part, rectangle in zip(groups, parts, rectangles, strict=True):
        assert rectangle.shape == (len(group), part.width, 3)
        for row, n in zip(rectangle, group.tolist(), strict=True):
            start = sum(lengths[:n])
            assert torch.equal(row[: lengths[n]], x[start : start + lengths[n]])
    joined = Buckets(parts).join(rectangles)
    assert torch.equal(joined[: sum(lengths)], x[: sum(lengths)])
    assert joined.shape == x.shape and not joined[sum(lengths) :].any()


def test_rectangles_hold_what_is_similar():
    g = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, 4000, (60, 2), generator=g)
    pairs[::7, 1] = 0
    groups = similar([[tuple(pair)] for pair in pairs.tolist()])
    members = torch.cat(groups)
    real = pairs.prod(1)
    assert sorted(members.tolist()) == real.nonzero().flatten().tolist()
    for group in groups:
        box = pairs[group].amax(0).prod() * len(group)
        limit = max(module.WASTE * real[group].sum(), module.FREE_PAIRS)
        assert box - real[group].sum() <= limit
    assert len(groups) > 4
    assert len(similar([[(60, 60)], [(3, 3)], [(20, 20)], [(1, 1)]])) == 1


def test_rounds_of_a_group_waste_little_together():
    """Samples of one to four rounds with growing keys: the padding of all rounds is bounded."""
    g = torch.Generator().manual_seed(0)
    samples = []
    for n in range(50):
        keys = torch.randint(1, 900, (n % 4 + 1,), generator=g).cumsum(0).tolist()
        queries = torch.randint(1, 600, (n % 4 + 1,), generator=g).tolist()
        samples.append(list(zip(queries, keys, strict=True)))
    samples[7] = []
    groups = similar(samples)
    assert sorted(torch.cat(groups).tolist()) == [n for n in range(50) if n != 7]
    assert 1 < len(groups) < 30
    for group in groups:
        mine = [samples[n] for n in group.tolist()]
        cells = 0
        for place in range(4):
            there = [rounds[place] for rounds in mine if len(rounds) > place]
            if there:
                cells += len(there) * max(q for q, _ in there) * max(k for _, k in there)
        real = sum(q * k for rounds in mine for q, k in rounds)
        assert cells - real <= max(module.WASTE * real, module.FREE_PAIRS)


def test_attention_over_a_long_sample_among_short_ones():
    """Against every sample alone, from softmax written out."""
    lengths, g = (300, 7, 0, 290, 1, 40), torch.Generator().manual_seed(1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    segments = Segments.from_cu_seqlens(cu_seqlens)
    assert len(segments.buckets.parts) > 1
    query, key, value = (
        torch.randn(segments.total, heads, 8, generator=g, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    found = causal_attention(query, key, value, segments)
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        for head in range(4):
            q, k, v = query[start:stop, head], key[start:stop, head // 2], value[start:stop]
            scores = (q @ k.T / math.sqrt(8)).masked_fill(
                torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf
            )
            expected = scores.softmax(-1) @ v[:, head // 2]
            # fp64 sums of up to 300 products
            torch.testing.assert_close(found[start:stop, head], expected, rtol=0, atol=1e-13)


def test_rows_in_another_order_are_no_stream():
    """Full rows of one width, of which the second stands first."""
    swapped = Segments(torch.tensor([8, 0]), torch.tensor([8, 8]), 8, 16)
    rectangle = swapped.to_rectangle(torch.arange(16))
    assert rectangle.tolist() == [[*range(8, 16)], [*range(8)]]
