"""Glimpses in the model: they start as nothing, samples do not see each other, the smallest window
follows its schedule, and what cannot work is one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mm.config import ConfigError, parse_pattern, validate
from megatron_mm.config.layers.queries import QuerySettings, query_settings, smallest_window
from megatron_mm.data.batch import BatchQueries
from megatron_mm.engine.optimizer import module_of
from megatron_mm.model.multimodal import build
from support.batches import microbatch, small_run
from support.samples import pack, relative, sample
from support.weights import looks_off_zero

PATTERN = "GE Q *E L V GE J"
SLOTS = 4


def query_run(**fusion):
    return small_run(PATTERN, **({"vision_memory": "pyramid"} | fusion))


@torch.no_grad()
def test_a_new_model_is_the_base_model_to_the_bit(pg):
    """Without its out-projection; the queries of the batch are there."""
    run = query_run()
    batch = microbatch(run.model, seed=1)
    assert len(batch.queries.positions_N)
    model = build(run, pg)[0]
    logits = model(batch).logits()
    base = build(small_run("GE *E GE", vision_memory="none"), pg)[0]
    assert torch.equal(logits, base(batch).logits())
    moved = looks_off_zero(model)(batch).logits()
    slots = (batch.queries.positions_N[:, None] + torch.arange(1, SLOTS + 1)).flatten()
    assert relative(moved[slots], logits[slots]) > 1e-2


@torch.no_grad()
def test_nothing_before_a_querys_slots_changes(pg):
    """A query changes its slots and what comes behind them in its sample, nothing else."""
    run = query_run()
    model = looks_off_zero(build(run, pg)[0])
    batch = microbatch(run.model, seed=1)
    position = int(batch.queries.positions_N[1])
    without = replace(batch, queries=BatchQueries.build([], []))
    only = replace(batch, queries=BatchQueries.build([position], [None]))
    there, gone = model(only).logits(), model(without).logits()
    assert torch.equal(there[: position + 1], gone[: position + 1])
    changed = (there != gone).any(1).nonzero().flatten()
    end = int(batch.cu_seqlens[torch.searchsorted(batch.cu_seqlens, position, right=True)])
    assert changed[0] == position + 1 and changed[-1] < end


def _with_queries(made, places):
    """Samples end to end with a query at each place of each."""
    starts = torch.tensor([0, *(len(s) for s in made)]).cumsum(0).tolist()
    at = [start + p for start, own in zip(starts, places, strict=False) for p in own]
    return lambda batch: replace(batch, queries=BatchQueries.build(at, [None] * len(at)))


@torch.no_grad()
def test_packed_samples_are_computed_as_if_alone(pg, double):
    """Text, two images, one image: slots between, before and behind images."""
    run = query_run()
    model = looks_off_zero(build(run, pg)[0])
    made = [sample(run.model, n, images, text=12) for n, images in enumerate([(), (2, 3), (3,)])]
    places = [[2], [len(made[1]) - 11, len(made[1]) - 5], [len(made[2]) - 6]]
    # One behind the first image and before the second: it sees one image, its neighbours two.
    places[1].insert(0, made[1].image_ends[0] + 2)
    packed = model(_with_queries(made, places)(pack(run.model, made))).logits()
    start = 0
    for one, own in zip(made, places, strict=True):
        alone = model(_with_queries([one], [own])(pack(run.model, [one]))).logits()
        assert relative(packed[start : start + len(one)], alone) < 1e-12
        start += len(one)


@torch.no_grad()
def test_a_query_that_sees_no_image_shows_nothing(pg):
    run = query_run()
    model = looks_off_zero(build(run, pg)[0])
    made = [sample(run.model, 0, (), text=12), sample(run.model, 1, (2,), text=12)]
    batch = pack(run.model, made)
    blind = _with_queries(made, [[2], [1]])(batch)  # in a text, and before the image
    assert torch.equal(model(blind).logits(), model(batch).logits())


def test_a_query_without_room_for_its_slots_is_rejected(pg):
    run = query_run()
    batch = microbatch(run.model, seed=1)
    last = int(batch.cu_seqlens[1]) - SLOTS
    model = build(run, pg)[0]
    for positions in ([last], [3, 5]):
        bad = replace(batch, queries=BatchQueries.build(positions, [None] * len(positions)))
        with pytest.raises(ValueError, match=f"its {SLOTS} slots end at"):
            model(bad)


def test_the_smallest_window_shrinks_and_never_grows(pg):
    settings = QuerySettings(query_first_scale=0.8, query_min_scale=0.2, query_anneal_share=0.5)
    found = [smallest_window(settings, done) for done in (0, 0.25, 0.5, 0.99)]
    assert found == pytest.approx([0.8, 0.4, 0.2, 0.2])
    run = query_run()
    (glimpse,) = build(run, pg)[0].language.queries.values()
    assert not glimpse.min_scale.requires_grad and float(glimpse.min_scale) == pytest.approx(0.8)
    sizes = []
    for done in (0, 0.35, 0.99, 0):
        glimpse.at_progress(done)
        sizes.append(float(glimpse.min_scale))
    assert sizes == pytest.approx([0.8, 0.8 * 0.1**0.5, 0.08, 0.08])


def test_glimpses_are_a_module_of_their_own():
    assert module_of("language.queries.0.linear_q.weight") == "avm"
    assert module_of("language.looks.0.linear_q.weight") == "clvr"


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("GE Q *E", "1 Q but only 0 V; every Q needs a V after it"),
        ("GE V *E", "'V' at position 4 has no Q before it"),
        ("GE L Q *E V", "1 L but only 0 J"),
        ("GE L *E V", "'V' at position 9 has no Q before it"),
    ],
)
def test_pairs_are_matched_by_their_kind(pattern, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_pattern(pattern)


def test_pairs_of_both_kinds_are_counted_by_themselves():
    layers = parse_pattern("GE L Q *E V Q J GE V")
    assert [(layer.kind, layer.pair) for layer in layers if layer.pair is not None] == [
        *(("L", 0), ("Q", 0), ("V", 0), ("Q", 1), ("J", 0), ("V", 1))
    ]


def test_settings_that_cannot_work_are_one_line():
    run = query_run()
    query_settings(run.model).query_min_scale = 0.9
    with pytest.raises(ConfigError, match=r"query_first_scale is 0.8; allowed: query_min_scale"):
        validate(run, 1)
    run = query_run(clvr_num_attention_heads=3)
    run.parallel.tensor_model_parallel_size = 2
    with pytest.raises(ConfigError, match="clvr_num_attention_heads 3 does not divide"):
        validate(run, 2)
    run = query_run()
    run.data.use_thumbnail = False
    with pytest.raises(ConfigError, match="use_thumbnail is False"):
        validate(run, 1)
