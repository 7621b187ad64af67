"""The layer pattern: numbering, pairs, stages, and what crosses each boundary."""

from itertools import combinations

import pytest

from megatron_mm.config import (
    ConfigError,
    Layer,
    Manifest,
    ParallelConfig,
    RunConfig,
    effective_pattern,
    model_stages,
    moved_pairs,
    num_layers,
    pair_places,
    parse_pattern,
    preset,
    stages,
    wire,
    without_clvr,
)
from megatron_mm.config.cost import Costs
from megatron_mm.config.memories import VISION


def letters(some_stages) -> str:
    return "|".join("".join(layer.kind for layer in stage.layers) for stage in some_stages)


def costs(some_stages) -> list[int]:
    return [sum(layer.kind in "G*E" for layer in stage.layers) for stage in some_stages]


def test_numbers_count_mixers_and_pairs_count_looks():
    assert parse_pattern("GE L G L E J *E J") == (
        Layer("G", number=0),
        Layer("E", number=0),
        Layer("L", pair=0),
        Layer("G", number=1),
        Layer("L", pair=1),
        Layer("E", number=1),
        Layer("J", pair=0),  # first in, first out: not the look that is nearest
        Layer("*", number=2),
        Layer("E", number=2),
        Layer("J", pair=1),
    )


@pytest.mark.parametrize("pattern", ["GE L GE J *E GE", "LJGEGE", "G L E J *E", "L*EGEJ"])
def test_clvr_never_shifts_layer_numbers(pattern):
    numbered = [layer for layer in parse_pattern(pattern) if layer.number is not None]
    assert tuple(numbered) == parse_pattern(without_clvr(pattern))
    assert num_layers(pattern) == num_layers(without_clvr(pattern)) == pattern.count("E")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("GE XGE", ["unknown letter 'X' at position 4", "allowed: G, *, E, L, J"]),
        ("ge", ["unknown letter 'g' at position 1"]),
        ("GE|GE", ["'|' at position 3", "pipeline_model_parallel_layout"]),
        ("GE J L", ["'J' at position 4", "no L before it"]),
        ("GE LJJ GE", ["'J' at position 6", "no L before it"]),
        ("GE L GE", ["1 L but only 0 J"]),
        ("L L GE J", ["2 L but only 1 J"]),
        ("EGE", ["'E' at position 1 needs a mixer"]),
        ("GEE", ["'E' at position 3 needs a mixer"]),
        ("GL*E J", ["'G' at position 1 needs an E or C before '*' at position 3"]),
        ("GE*", ["'*' at position 3 needs an E or C after it"]),
        ("", ["has no layers"]),
        ("  ", ["has no layers"]),
        ("LJ", ["has no layers"]),
    ],
)
def test_bad_patterns(pattern, words):
    with pytest.raises(ConfigError) as error:
        parse_pattern(pattern)
    message = str(error.value)
    assert "\n" not in message
    for word in ["hybrid_layer_pattern", repr(pattern), *words]:
        assert word in message


def test_stages_follow_a_layout():
    found = stages("GE L GE J *E", 3, "GEL | G | EJ*E")
    assert letters(found) == "GEL|G|EJ*E"
    assert [stage.index for stage in found] == [0, 1, 2]
    assert found[2].layers[0] == Layer("E", number=1)


def test_first_and_last_stage_of_a_layout_may_be_empty():
    assert letters(stages("GEGE", 3, "|GEGE|")) == "|GEGE|"
    with pytest.raises(ConfigError, match="stage 1 of 3 is empty"):
        stages("GEGE", 3, "GE||GE")


@pytest.mark.parametrize(
    ("size", "layout", "words"),
    [
        (3, "GE|GE", ["has 2 stages", "pipeline_model_parallel_size 3"]),
        (1, "GE|GE", ["has 2 stages", "pipeline_model_parallel_size 1"]),
        (2, "GE|*E", ["'GE|*E'", "letter 3 is *", "allowed: G"]),
        (2, "GE|G", ["letter 4 is missing", "allowed: E"]),
        (2, "GE|GEGE", ["letter 5 is G", "allowed: nothing more"]),
        (2, "GE|LGEJ", ["letter 3 is L", "allowed: G"]),
    ],
)
def test_bad_layouts(size, layout, words):
    with pytest.raises(ConfigError) as error:
        stages("GEGE", size, layout)
    for word in ["pipeline_model_parallel_layout", *words]:
        assert word in str(error.value)


COSTS = {
    "unit": Costs(),
    "a large ViT": Costs(first=5.0),
    "real": Costs({"G": 3.0, "*": 4.5, "E": 7.25, "L": 1.5, "J": 0.0}, first=9.0, last=6.0),
}


@pytest.mark.parametrize("pattern", ["GE L GE J *E GE", "GEGEGE*E" * 3, "L GE L J J GE *E", "LJGE"])
@pytest.mark.parametrize("name", COSTS)
def test_balanced_split_is_the_best_there_is(pattern, name):
    """Against every possible split: the cheapest largest stage, then the evenest, then the most
    boundaries between a look and its injection."""
    layers, cost = parse_pattern(pattern), COSTS[name]
    total = sum(layer.kind in "G*E" for layer in layers)

    def waiting(cut: int) -> bool:
        kinds = [layer.kind for layer in layers[:cut]]
        return kinds.count("L") > kinds.count("J")

    def score(parts: list, splits: int) -> tuple[float, float, int]:
        each = [sum(cost.letters[layer.kind] for layer in part) for part in parts]
        each[0] += cost.first
        each[-1] += cost.last
        return max(each), sum(x * x for x in each), -splits

    for size in range(1, min(total, 4) + 1):
        found = stages(pattern, size, cost=cost)
        assert len(found) == size
        assert tuple(layer for stage in found for layer in stage.layers) == layers
        options = []
        for cuts in combinations(range(1, len(layers)), size - 1):
            bounds = zip((0, *cuts), (*cuts, len(layers)), strict=True)
            parts = [layers[a:b] for a, b in bounds]
            if all(any(layer.kind in "G*E" for layer in part) for part in parts):
                options.append(score(parts, sum(map(waiting, cuts))))
        chosen = sum(
            bool(manifest.refinements) for manifest in wire(found, [VISION] * pattern.count("L"))
        )
        assert score([stage.layers for stage in found], chosen) == min(options)


def test_the_stage_with_the_vision_model_or_a_look_holds_fewer_layers():
    run = RunConfig(model=preset("mm-80b"))
    run.parallel.pipeline_model_parallel_size = 4
    found = costs(model_stages(run))
    assert found[0] < min(found[1:])
    run.training.freeze_vision = True  # no backward pass through it
    assert costs(model_stages(run))[0] >= found[0]
    heavy = Costs({"G": 1.0, "*": 1.0, "E": 1.0, "L": 4.0, "J": 0.0})
    assert costs(stages("GE L GEGE*E J GEGE*E", 2, cost=heavy)) == [5, 9]


def test_balanced_split_is_even_where_it_can_be():
    assert costs(stages("GEGEGE*E" * 12, 8)) == [12] * 8
    assert sorted(costs(stages("GE" * 5, 4))) == [2, 2, 3, 3]  # not 1, 3, 3, 3
    assert letters(stages("GE L GE J *E GE", 2)) == "GELGE|J*EGE"


def test_more_stages_than_layers():
    assert costs(stages("L GE J", 2)) == [1, 1]
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size 3 is more than the 2 "):
        stages("L GE J", 3)
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size 0; allowed: 1 or more"):
        stages("GE", 0)


def test_wire_with_several_pairs_in_flight():
    pattern = "GE L GE L GE J GE L GE J GE J GE"
    layout = "GE L| GE L| GE J| GE L| GE J| GE J| GE"
    found = wire(stages(pattern, 7, layout), [VISION] * 3)
    assert found == (
        Manifest(memories=(VISION,), refinements=(("looks", 0),)),
        Manifest(memories=(VISION,), refinements=(("looks", 0), ("looks", 1))),
        Manifest(memories=(VISION,), refinements=(("looks", 1),)),
        Manifest(memories=(), refinements=(("looks", 1), ("looks", 2))),
        Manifest(memories=(), refinements=(("looks", 2),)),
        Manifest(memories=(), refinements=()),
    )


@pytest.mark.parametrize("pattern", ["GE L GE J *E GE", "L GE L *E J J", "G L E L J *E J", "GE*E"])
def test_wire_carries_exactly_what_is_needed_at_any_boundary(pattern):
    """Walk the letters and keep what is at hand: with the manifest each stage has what its
    looks and injects use, and with less it would not."""
    layers = parse_pattern(pattern)
    for cut in range(1, len(layers)):
        text = "".join(layer.kind for layer in layers)
        split = stages(pattern, 2, f"{text[:cut]}|{text[cut:]}")
        (manifest,) = wire(split, [VISION] * text.count("L"))
        later_looks = [layer.pair for layer in layers[cut:] if layer.kind == "L"]
        later_injects = [layer.pair for layer in layers[cut:] if layer.kind == "J"]
        assert manifest.memories == ((VISION,) if later_looks else ())
        pairs = set(later_injects) - set(later_looks)
        assert set(manifest.refinements) == {("looks", pair) for pair in pairs}
        assert list(manifest.refinements) == sorted(manifest.refinements)


def test_places_of_pairs_count_letters_of_the_base():
    assert pair_places("GE *E") == {}
    assert pair_places("L GE Q L *E V J J") == {"looks": [(0, 4), (2, 4)], "queries": [(2, 4)]}
    assert moved_pairs("GE L *E J", "G E  L * E J L GE J") == []
    assert moved_pairs("GE L *E J", "L GE J L *E J") == [
        "looks.0 was behind 2 and 4 letters of the base, is behind 0 and 2"
    ]


def test_no_wire_without_a_boundary():
    assert wire(stages("GE L GE J", 1), [VISION]) == ()


def test_an_injection_at_once_needs_no_wire_of_its_own():
    assert wire(stages("GE LJ GE", 2, "GELJ|GE"), [VISION]) == (Manifest((), ()),)
    assert wire(stages("GE LJ GE", 2, "GE|LJGE"), [VISION]) == (Manifest((VISION,), ()),)


def test_effective_pattern_drops_looks_that_have_nothing_to_look_at():
    model = preset("tiny")
    model.hybrid_layer_pattern = "GE L GE J *E GE"
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, pipeline_model_parallel_layout="GELGE|J*EGE"
    )
    run = RunConfig(model=model, parallel=parallel)
    assert effective_pattern(model) == model.hybrid_layer_pattern
    assert letters(model_stages(run)) == "GELGE|J*EGE"
    model.fusion.vision_memory = "none"
    assert effective_pattern(model) == "GEGE*EGE"
    assert letters(model_stages(run)) == "GEGE|*EGE"
    # The layout is still held against the pattern it was written for.
    parallel.pipeline_model_parallel_layout = "GEGE|*EGE"
    with pytest.raises(ConfigError, match="letter 3 is G, allowed: L"):
        model_stages(run)
    model.vision, model.fusion.vision_memory = None, "tiles"
    assert effective_pattern(model) == "GEGE*EGE"
