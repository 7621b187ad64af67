"""The table against what does not come from it: weights copied by hand, transformers' own names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mm.benchmark.hf_weights import MCORE_ONLY, copy_weights
from megatron_mm.config import ParallelConfig, RunConfig, preset, to_transformers_dict, without_clvr
from megatron_mm.convert import mapping as planning
from megatron_mm.convert import summary as report
from megatron_mm.convert.mapping import PROJECTOR, SIDES, find_row, read_mapping, write_links
from megatron_mm.convert.table import rows as table_rows
from megatron_mm.errors import ConvertError
from megatron_mm.model.blueprint import blueprint
from megatron_mm.model.families.transforms import ByHead, Joined, Stacked, Transform
from megatron_mm.model.multimodal import build
from megatron_mm.parallel import groups
from support.batches import SMALL_MODELS, small_model, small_qwen3_5_moe, two_memories
from support.folders import SIX_B, base_model, meta, planned, save_fused, shapes_of

MODELS = {
    "300M and CLVR": small_model(),
    "6B": replace(base_model(**SIX_B)),
    "Qwen3.5-MoE and two memories": small_qwen3_5_moe(**two_memories("overview", "detail")),
    "glimpses": small_model("GE Q *E V", vision_memory="pyramid"),
}
ROWS = {kind: table_rows(model) for kind, model in MODELS.items()}
# Every row once: those that models share are served by the first that has them.
EVERY_ROW = list(dict.fromkeys(row for rows in ROWS.values() for row in rows))


@pytest.fixture(scope="module", params=SMALL_MODELS)
def folder(request, tmp_path_factory):
    """(the folder, transformers' model of it, ours) of a family."""
    made, model = tmp_path_factory.mktemp("hf"), base_model(family=request.param)
    return made, save_fused(made, model), model


@pytest.fixture
def by_hand(folder):
    """(our tensors as benchmark/hf_weights.py copies them, the folder)"""
    path, hf, config = folder
    groups.start(ParallelConfig())
    model = build(RunConfig(model=config), groups.build(ParallelConfig()).pg)[0]
    copy_weights(hf, model)
    yield dict(model.named_parameters()), path
    groups.stop()


def differing(by_hand) -> list[str]:
    """Names of ours that the table makes otherwise than the copy by hand."""
    expected, path = by_hand
    source, plan, _ = planned(path)
    made = {k.mcore: k.to_mcore(source.read, 0, k.shape[0]) for k in plan.links}
    assert made.keys() == {n for n in expected if not n.startswith(MCORE_ONLY)}
    return [n for n, t in made.items() if not torch.equal(t.flatten(), expected[n].flatten())]


def test_the_table_makes_what_is_copied_by_hand(by_hand):
    assert differing(by_hand) == []


def test_two_experts_exchanged_are_noticed(by_hand, monkeypatch):
    named = planning.ParamMapping.named

    def exchanged(link, expert):
        return named(link, {0: 1, 1: 0}.get(expert, expert))

    monkeypatch.setattr(planning.ParamMapping, "named", exchanged)
    assert len(differing(by_hand)) == 8  # gate_up and down of four layers


@pytest.fixture(scope="module")
def blueprints():
    """Made once: names and shapes, which nothing here changes."""
    return {name: blueprint(model) for name, model in MODELS.items()}


@pytest.mark.parametrize("number", range(len(EVERY_ROW)))
def test_no_row_can_be_missing(blueprints, number):
    """Each serves a tensor, and without it nothing is converted."""
    served = []
    for kind, model in MODELS.items():
        parameters = blueprints[kind]
        rows = [row for row in ROWS[kind] if row is not EVERY_ROW[number]]
        served += [n for n in parameters if find_row(n, ROWS[kind])[0] is EVERY_ROW[number]]
        if not served:
            continue
        with pytest.raises(ConvertError, match="in no row of the table"):
            write_links(model, parameters, "transformers", rows=rows)
        with pytest.raises(ConvertError, match="in no row of the table"):
            read_mapping(model, parameters, {}, rows=rows)
        break
    assert served


def test_no_tensor_is_served_twice(blueprints):
    for kind, model in MODELS.items():
        for spelling in ("transformers", "stacked", "release"):
            links = write_links(model, blueprints[kind], spelling)
            names = [name for link in links for name, _ in link.hf_tensors()]
            assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "transform, shape",
    [
        (Transform(), (3, 4)),
        (Stacked(2), (2, 5, 3)),
        (Joined(), (2, 5, 3)),
        (ByHead(3, (2, 1, 4)), (21, 5)),
        (ByHead(3, (2, 1, 4), fused=3), (21,)),
        (ByHead(3, (2, 1, 4, 3), fused=2), (30, 4)),
        (ByHead(4, (2, 2, 3), fused=3, unit=True), (28, 6)),
    ],
)
def test_transforms_are_their_own_inverse(transform, shape):
    """Both ways round, on numbers that are all different."""
    ours = torch.randperm(torch.Size(shape).numel()).view(shape)
    theirs = transform.to_hf(ours)
    assert [tuple(t.shape) for t in theirs] == transform.hf_shapes(shape)
    assert torch.equal(transform.to_mcore(theirs, shape), ours)
    assert torch.equal(transform.to_mcore(theirs, shape, torch.zeros_like(ours)), ours)
    again = transform.to_hf(transform.to_mcore([t + 1000 for t in theirs], shape))
    assert all(torch.equal(a, b + 1000) for a, b in zip(again, theirs, strict=True))


def test_heads_that_do_not_make_the_shape_are_refused():
    with pytest.raises(ValueError, match="3 heads of 7 rows"):
        ByHead(3, (2, 1, 4)).hf_shapes((20, 5))


def total(shapes: dict) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


# 18 s of CPU time: transformers builds both models, on the meta device, in a process of its own.
@pytest.mark.slow
def test_the_published_80b_and_6b():
    """Every tensor of the real sizes, by name and shape, from the config alone."""
    model = preset("mm-80b")
    base = replace(model, hybrid_layer_pattern=without_clvr(model.hybrid_layer_pattern))
    words = to_transformers_dict(base, image_token_id=151671)
    text = to_transformers_dict(replace(base, vision=None))
    (inside, saved), (_, published) = meta(words, text)
    parameters = blueprint(model)
    clvr = [n for n in parameters if SIDES.match(n)]
    base_parameters = {n: p for n, p in parameters.items() if n not in clvr}
    assert shapes_of(write_links(base, base_parameters, "stacked")) == inside
    assert shapes_of(write_links(base, base_parameters, "transformers")) == saved
    fused = report.published(base, base_parameters, separate=False)
    assert report.totals(fused, 2) == (len(saved), total(saved))
    assert len(saved) > 74_000 and total(saved) > 170e9

    needed = {n: p for n, p in base_parameters.items() if not PROJECTOR.match(n)}
    apart = report.published(base, needed, separate=True)
    found = shapes_of(apart)
    assert {n: s for n, s in found.items() if n in published} == published
    # of the ViT, as released: 45 layers of 13 tensors (weight of qkv, weight and bias of three
    # linears, four norms' weights, two scales) and 4 of the embedding
    assert len(found) - len(published) == 45 * 13 + 4
    vision = {n: s for n, s in inside.items() if n.startswith("model.vision_tower.")}
    assert report.totals(apart, 2) == (len(found), total(published) + total(vision))
