"""CLVR: it starts as nothing, sees what it may, and never turns into NaN."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_mm.config import memories
from megatron_mm.config.layers.looks import COORDINATE_FREQUENCIES
from megatron_mm.model import segments
from megatron_mm.model.context import StreamContext, memory_rows
from megatron_mm.model.core_config import language_config
from megatron_mm.model.layers.clvr import Look
from megatron_mm.model.memory_map import MemoryMap
from megatron_mm.model.multimodal import build
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.param_layout import initialize
from support.batches import microbatch, small_run
from support.samples import pack, relative, sample
from support.weights import looks_off_zero

PATTERN = "GE L *E GE L J *E J"
# In fp64 a difference that is not rounding (1e-15) is information that went astray.
DOUBLE_TOLERANCE = 1e-12
PATCHES = 16  # of a tile of the small model


# --- as initialised -----------------------------------------------------------------------


@torch.no_grad()
def test_a_new_model_is_the_base_model_to_the_bit(pg):
    batch = microbatch(small_run().model, seed=1)
    model = build(small_run(), pg)[0]
    assert len(model.language.looks) == 2
    logits = model(batch).logits()
    base = build(small_run(vision_memory="none"), pg)[0]
    assert not len(base.language.looks) and base.vision.memory_proj is None
    assert torch.equal(logits, base(batch).logits())
    unread = build(small_run("GE *E GE *E"), pg)[0]
    assert torch.equal(logits, unread(batch).logits())
    # It is the zero out-projection that does it, not a look that is never run.
    assert relative(looks_off_zero(model)(batch).logits(), logits) > 1e-2


# --- one look -----------------------------------------------------------------------------


class Stage:
    """A look by itself, with a random hidden state and memory, over a given microbatch."""

    def __init__(self, pg, samples, run, pad_multiple=1):
        self.model = run.model
        self.batch = pack(run.model, samples, pad_multiple)
        config = language_config(run)
        (memory,) = memories(run.model)
        self.look = Look(run.model, config, pg, memory)
        initialize(self.look, seed=5)
        g = torch.Generator().manual_seed(6)
        self.look.linear_proj.weight.data.normal_(0, 0.2, generator=g)
        for name, param in self.look.named_parameters():
            if "norm" in name:
                param.data.normal_(0, 0.2, generator=g)
        self.held = self.batch.memories[memory.name]
        self.context = StreamContext.build(self.batch, run.model, pg, [memory])
        rows = memory_rows(self.batch, memory, 1)
        self.hidden = torch.randn(len(self.batch.tokens_T), 1, 64, generator=g)
        self.memory = torch.randn(rows, 1, 32, generator=g)
        self.memory[len(self.held.visible_M2) :] = 0

    @property
    def map(self) -> MemoryMap:
        return self.context.memories["vision"]

    def __call__(self, memory=None, coordinates=None, record=None):
        map_ = self.map
        if coordinates is not None:
            map_ = replace(map_, coordinates_M2=coordinates)
        memory = self.memory if memory is None else memory
        return self.look(self.hidden, {"vision": memory}, {"vision": map_}, record)

    def sees(self) -> torch.Tensor:
        """bool [T, M], straight from the batch: patch m is seen from `from` up to `to`."""
        at = torch.arange(len(self.batch.tokens_T))[:, None]
        first, last = self.held.visible_M2.unbind(1)
        return (at >= first) & (at < last)


def mixed(model):
    """Text, two images, text, one image: the memory has samples of length 0 between others."""
    return [sample(model, i, n, text=4 + i) for i, n in enumerate([(), (2, 1), (), (3,)])]


@torch.no_grad()
def test_a_blind_position_gets_exactly_zero(pg):
    run = small_run()
    stage = Stage(pg, mixed(run.model), run, pad_multiple=32)
    out = stage()[:, 0]
    sighted = stage.sees().any(1)
    assert 0 < sighted.sum() < len(sighted)
    assert not out[~sighted].any()
    assert out[sighted].any(1).all()


def test_no_image_at_all(pg):
    run = small_run()
    stage = Stage(pg, [sample(run.model, 0), sample(run.model, 1, text=9)], run)
    stage.hidden.requires_grad_()
    stage.memory.requires_grad_()
    out = stage()
    assert not out.detach().any()
    out.sum().backward()
    for tensor in (stage.hidden, stage.memory, *stage.look.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()


def test_gradients_of_masked_positions_are_finite_and_zero(pg):
    run = small_run()
    stage = Stage(pg, mixed(run.model), run, pad_multiple=32)
    stage.hidden.requires_grad_()
    stage.memory.requires_grad_()
    stage().square().sum().backward()
    sees = stage.sees()
    for tensor in (stage.hidden, stage.memory, *stage.look.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
    assert not stage.hidden.grad[~sees.any(1)].any()
    used = sees.any(0)
    assert stage.memory.grad[: len(used)][used].flatten(1).any(1).all()
    assert not stage.memory.grad[len(used) :].any()


@torch.no_grad()
def test_order_of_patches_counts_only_through_coordinates(pg, double):
    for coordinates in (False, True):
        run = small_run(memory_coordinates=coordinates)
        stage = Stage(pg, mixed(run.model), run)
        order = torch.arange(len(stage.memory))
        # The last image alone: patches of one image are seen by the same positions.
        last = slice(len(stage.held.visible_M2) - 3 * PATCHES, None)
        order[last] = order[last].flip(0)
        out = stage()
        moved = relative(stage(stage.memory[order]), out)
        if not coordinates:
            assert moved <= DOUBLE_TOLERANCE
        else:
            assert moved > 1e-3
            along = stage.map.coordinates_M2[order]
            assert relative(stage(stage.memory[order], along), out) <= DOUBLE_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_a_look_by_hand(pg, double, monkeypatch, groups):
    """Attention written out for every position, patch and head, from the weights' layout; the
    two samples with images in one group or in two."""
    if groups == 2:
        monkeypatch.setattr(segments, "WASTE", 0)
        monkeypatch.setattr(segments, "FREE_PAIRS", 0)
    run = small_run()
    stage = Stage(pg, mixed(run.model), run)
    look, heads, width = stage.look, 4, 16
    assert len(stage.map.groups) == groups
    patches = len(stage.held.visible_M2)
    query = look.linear_q(look.query_norm(stage.hidden))[0].view(-1, heads, width)
    memory = look.memory_norm(stage.memory[:patches, 0])
    rows = look.linear_kv.weight.view(heads, 2, width, -1)
    key = torch.einsum("mc,hdc->mhd", memory, rows[:, 0])
    value = torch.einsum("mc,hdc->mhd", memory, rows[:, 1])
    half_periods = 2.0 ** torch.arange(COORDINATE_FREQUENCIES)
    angle = stage.held.coordinates_M2[:, :, None] * torch.pi * half_periods
    # (y sines, y cosines, x sines, x cosines)
    features = torch.cat((angle.sin(), angle.cos()), -1).flatten(1)
    key = key + (features @ look.linear_coordinates.weight.T).view_as(key)
    query, key = (
        x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
        for x, norm in ((query, look.q_norm), (key, look.k_norm))
    )
    scores = torch.einsum("thd,mhd->htm", query, key) / width**0.5
    sees = stage.sees()
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    found = torch.einsum("htm,mhd->thd", weights, value).flatten(1)
    expected = found @ look.linear_proj.weight.T
    record = []
    assert relative(stage(record=record)[:, 0], expected) <= DOUBLE_TOLERANCE
    # What is recorded is what was used.
    stream, ends = stage.context.segments, stage.held.visible_M2[:, 1]
    assert len(record) == stream.count
    for part, start, length in zip(record, stream.starts, stream.lengths, strict=True):
        mine = weights[:, start : start + length, ends == start + length]
        torch.testing.assert_close(part, mine, rtol=0, atol=1e-12)


@torch.no_grad()
def test_recorded_weights_of_the_whole_model(pg):
    run = small_run()
    model = looks_off_zero(build(run, pg)[0]).eval()
    batch = pack(run.model, mixed(run.model))
    looks = {}
    logits = model(batch, looks=looks).logits()
    assert torch.equal(logits, model(batch).logits()), "recording changes nothing"
    assert sorted(looks) == [0, 1]
    starts, (first, last) = batch.cu_seqlens.tolist(), batch.memories["vision"].visible_M2.unbind(1)
    for pair in looks.values():
        for weights, start, end in zip(pair, starts[:-1], starts[1:], strict=True):
            visible = torch.arange(start, end)[:, None] >= first[last == end]
            assert weights.shape == (4, *visible.shape)
            sees = visible.any(-1).float().expand(4, -1)
            # The sum of up to 48 fp32 weights.
            torch.testing.assert_close(weights.sum(-1), sees, rtol=0, atol=1e-6)
            assert not weights[:, ~visible].any()
    assert not torch.equal(looks[0][1], looks[1][1])


@pytest.mark.parametrize("pattern", [PATTERN, "GE L GE L J J *E", "L GE J LJ *E"])
@torch.no_grad()
def test_what_a_look_found_is_added_where_it_is_injected(pg, pattern):
    """The k-th J adds the refinement of the k-th L and nothing else; an L adds nothing."""
    run = small_run(pattern)
    model = looks_off_zero(build(run, pg)[0]).eval()
    found, states = {}, []
    for pair, look in model.language.looks.items():
        look.register_forward_hook(lambda m, i, out, pair=int(pair): found.setdefault(pair, out))
    model.watch = lambda layer, hidden: states.append((layer, hidden.clone()))
    model.language.register_forward_pre_hook(
        lambda m, inputs: states.append((None, inputs[0].hidden_T1H.clone()))
    )
    model(pack(run.model, mixed(run.model)))
    assert [layer.kind for layer, _ in states[1:]] == list(pattern.replace(" ", ""))
    assert not torch.equal(found[0], found[1])
    injected = []
    for (_, before), (layer, after) in pairwise(states):
        if layer.kind == "L":
            assert torch.equal(after, before)
        elif layer.kind == "J":
            assert torch.equal(after, before + found[layer.pair])
            injected.append(layer.pair)
    assert injected == [0, 1]


# --- who sees what, through the whole model -------------------------------------------------


def changed_positions(model, before, after) -> torch.Tensor:
    """bool [T]: where the logits moved by more than rounding, fp64."""
    with torch.no_grad():
        a, b = model(before).logits(), model(after).logits()
    return (a - b).norm(dim=1) > DOUBLE_TOLERANCE * a.norm(dim=1)


@pytest.mark.parametrize("offset", [0, 3, 5, 9, 12, 20])
def test_a_later_token_changes_no_earlier_logit(pg, double, offset):
    run = small_run()
    model = looks_off_zero(build(run, pg)[0]).eval()
    s = sample(run.model, 4, (2, 1), text=5)
    text = [i for i in range(len(s)) if i not in s.stream_positions]
    at = text[min(offset, len(text) - 1)]
    tokens = list(s.tokens)
    tokens[at] = (tokens[at] + 1) % 90
    batches = (pack(run.model, [x]) for x in (s, replace(s, tokens=tokens)))
    moved = changed_positions(model, *batches)
    assert torch.equal(moved, torch.arange(len(s)) >= at)


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("part", ["tile", "thumbnail"])
def test_who_sees_which_image(pg, double, image, part):
    """Two images of two tiles. Their tiles are in the memory only, so between the images the
    first one's count and the second one's do not; a thumbnail counts where it stands."""
    run = small_run()  # thumbnail in the stream, tiles in the memory
    model = looks_off_zero(build(run, pg)[0]).eval()
    s = sample(run.model, 4, (2, 2), text=5)
    pixels = s.pixels.clone()
    pixels[3 * image + (1 if part == "tile" else 2)] ^= 64
    batches = (pack(run.model, [x]) for x in (s, replace(s, pixels=pixels)))
    moved = changed_positions(model, *batches)
    first = s.image_ends[image] - (0 if part == "tile" else 4)
    assert torch.equal(moved, torch.arange(len(s)) >= first)


@torch.no_grad()
def test_between_two_images_only_the_first_is_looked_at(pg):
    run = small_run()
    model = looks_off_zero(build(run, pg)[0]).eval()
    s = sample(run.model, 4, (2, 2), text=5)
    looks = {}
    model(pack(run.model, [s]), looks=looks)
    (weights,) = looks[0]  # [h, T, 64]: two tiles of 16 patches per image
    one, two = s.image_ends
    first, second = weights[:, :, :32], weights[:, :, 32:]
    assert not weights[:, :one].any()
    assert (first[:, one:] > 0).all()
    assert not second[:, :two].any()
    assert (second[:, two:] > 0).all()


def test_memory_map_by_hand():
    """Two samples, the first without an image. Four rows for two patches is exactly the size
    of the rectangle, and yet the memory is not the rectangle."""
    stream = Segments.from_cu_seqlens(torch.tensor([0, 3, 7]))
    visible, coordinates = torch.tensor([[4, 7], [5, 7]]), torch.rand(2, 2)
    map_ = MemoryMap.build(stream, stream, visible, coordinates, rows=4)
    assert map_.stairs == [[], [(4, 1, 1), (5, 2, 2)]]
    (group,) = map_.groups
    memory = torch.tensor([10.0, 20.0, 0.0, 0.0])
    assert group.patches.to_rectangle(memory).tolist() == [[10.0, 20.0]]
    assert [(part.rows, part.patches, part.mask) for part in group.rounds] == [
        (1, 1, None),
        (1, 2, None),
    ]
    assert torch.equal(map_.coordinates_M2[:2], coordinates)
    assert map_.coordinates_M2.shape == (4, 2)
    packed = map_.packed
    assert packed.positions.tolist() == [4, 5, 6] and packed.counts == [1, 2]
    # In the first round nobody sees the second patch; in both nobody sees the padding.
    assert [bounds.queries.tolist() for bounds in packed.bounds] == [[0, 1, 1], [0, 2, 2]]
    assert [bounds.keys.tolist() for bounds in packed.bounds] == [[0, 1, 4], [0, 2, 4]]
    assert [(b.most_queries, b.most_keys) for b in packed.bounds] == [(1, 3), (2, 2)]


def test_rounds_are_as_many_as_images_and_not_as_samples():
    """200 short samples with one image each and one sample with three."""
    lengths, images = [30] * 201, [1] * 200 + [3]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    visible = []
    for start, length, count in zip(starts.tolist(), lengths, images, strict=False):
        for image in range(count):
            visible += [[start + 5 + 6 * image, start + length]] * (8 + image)
    stream = Segments.from_cu_seqlens(starts)
    map_ = MemoryMap.build(
        stream, stream, torch.tensor(visible), torch.rand(len(visible), 2), len(visible)
    )
    assert len(map_.packed.bounds) == 3
    assert len(map_.buckets.parts) <= 4
    assert sum(step.mask is not None for group in map_.groups for step in group.rounds) <= 1


@pytest.mark.parametrize("visible", [[[2, 4], [1, 4]], [[5, 7], [2, 4]]])
def test_patches_out_of_order_are_refused(visible):
    """Inside a sample, and samples."""
    stream = Segments.from_cu_seqlens(torch.tensor([0, 4, 7]))
    (a, b), (c, d) = visible
    words = f"patch 1 of a memory is seen from position {c} to {d}, .* from {a} to {b}; order"
    with pytest.raises(ValueError, match=words):
        MemoryMap.build(stream, stream, torch.tensor(visible), torch.rand(2, 2), rows=2)
