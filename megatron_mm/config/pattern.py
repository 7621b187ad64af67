"""The layer pattern: the sub-layers of a model and the pipeline stages that hold them.

Each letter is one sub-layer of a kind registered in config/layers/kinds.py, such as `G` gated
DeltaNet, `*` gated attention, `E` mixture of experts, `L` look at the vision memory, `J` inject
what a look found, `Q` glimpse at a place that a token asks for, `V` show what the glimpse found.
Spaces mean nothing. A *layout* is the same pattern with `|` at the pipeline stage boundaries.

A transformers "layer" is a mixer (`G` or `*`) and the feed-forward (`E`) after it, with one number.
Side letters such as `L` and `J` are not numbered, so adding them never shifts a layer's keys. Their
pairs are counted among themselves (`looks.0`); pairs.py finds those that adding one shifts.
Everything in this file is a pure function of strings and tuples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

from megatron_mm.config.cost import Costs, costs
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.memories import Memory, look_memories, memories
from megatron_mm.config.settings import MODULES, RunConfig
from megatron_mm.config.settings_model import ModelConfig
from megatron_mm.config.tree import brief
from megatron_mm.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """One sub-layer.

    Attributes:
        kind: its letter.
        number: the transformers layer that a mixer or a feed-forward belongs to; None for a side.
        pair: the pair that a side belongs to, counted by key (`looks`, `queries`); None for the
            others.
        reader: its place among the layers that read a vision memory; None for the others.
    """

    kind: str
    number: int | None = None
    pair: int | None = None
    reader: int | None = field(default=None, compare=False)  # follows from the letters before

    @property
    def numbered(self) -> bool:
        return self.number is not None

    @property
    def known_number(self) -> int:
        """`number` of a mixer or a feed-forward."""
        assert self.number is not None
        return self.number

    @property
    def known_pair(self) -> int:
        """`pair` of a side."""
        assert self.pair is not None
        return self.pair

    @property
    def refinement(self) -> tuple[str, int]:
        """The key and the number of the pair of a side: the name of what waits between them."""
        return LAYERS[self.kind].key, self.known_pair

    @property
    def known_reader(self) -> int:
        """`reader` of a layer that reads a vision memory."""
        assert self.reader is not None
        return self.reader


@dataclass(frozen=True)
class Stage:
    """Consecutive sub-layers that one pipeline stage holds. With virtual stages, stage i is on
    pipeline rank i % pipeline_model_parallel_size."""

    index: int
    layers: tuple[Layer, ...]


LOOKS = "looks"  # the key of CLVR's pairs
# Letters of a model. Dealing them to stages takes the square of their number.
MAX_LETTERS = 1024


def _wrong(pattern: str, reason: str) -> ConfigError:
    return ConfigError(f"hybrid_layer_pattern {brief(pattern)}: {reason}")


def _check_length(key: str, pattern: str) -> None:
    if len(pattern) > 2 * MAX_LETTERS:
        raise ConfigError(f"{key} has {len(pattern)} characters; allowed: up to {2 * MAX_LETTERS}")


def _words(letters: list[str]) -> str:
    return " or ".join(letters) or "no letter"


def parse_pattern(pattern: str) -> tuple[Layer, ...]:
    """Reads a model pattern. The k-th `L` is injected by the k-th `J`, the k-th `Q` shown by the
    k-th `V`; several may wait.

    Raises ConfigError for an unknown letter, a mixer without its feed-forward, a feed-forward
    without its mixer, a `J` before its `L`, an `L` that is never injected, or no layers at all.
    Positions in messages count characters from 1, spaces included.
    """
    _check_length("hybrid_layer_pattern", pattern)
    mixers, closers = LAYERS.of_role("mixer"), LAYERS.of_role("ffn")
    opens = LAYERS.of_pair("opens")
    allowed = ", ".join(LAYERS)
    layers: list[Layer] = []
    count = 0
    opened: dict[str, int] = dict.fromkeys((LAYERS[letter].key for letter in opens), 0)
    closed = dict(opened)
    open_mixer: str | None = None  # the mixer that still waits for its feed-forward
    for position, letter in enumerate(pattern, start=1):
        here = f"{letter!r} at position {position}"
        if letter.isspace():
            continue
        if letter == "|":
            raise _wrong(
                pattern, f"{here} belongs in pipeline_model_parallel_layout, not in the model"
            )
        if letter not in LAYERS:
            raise _wrong(
                pattern,
                f"unknown letter {here}; allowed: {allowed}, or one that a module in plugins adds",
            )
        if letter in mixers:
            if open_mixer:
                raise _wrong(pattern, f"{open_mixer} needs an {_words(closers)} before {here}")
            open_mixer = here
            layers.append(Layer(letter, number=count))
            count += 1
        elif letter in closers:
            if open_mixer is None:
                needs = f"needs a mixer ({_words(mixers)}) of its own before it"
                raise _wrong(pattern, f"{here} {needs}")
            layers.append(Layer(letter, number=count - 1))
            open_mixer = None
        elif letter in opens:
            key = LAYERS[letter].key
            layers.append(Layer(letter, pair=opened[key]))
            opened[key] += 1
        else:
            key = LAYERS[letter].key
            if closed.get(key) == opened.get(key):
                openers = _words(LAYERS.of_pair("opens", key))
                raise _wrong(pattern, f"{here} has no {openers} before it to inject")
            layers.append(Layer(letter, pair=closed[key]))
            closed[key] += 1
    if open_mixer:
        raise _wrong(pattern, f"{open_mixer} needs an {_words(closers)} after it")
    for key, count_opened in opened.items():
        if closed[key] < count_opened:
            look, injection = (_words(LAYERS.of_pair(p, key)) for p in ("opens", "closes"))
            raise _wrong(
                pattern,
                f"{count_opened} {look} but only {closed[key]} {injection}; every {look} needs a "
                f"{injection} after it",
            )
    if len(layers) > MAX_LETTERS:
        raise _wrong(pattern, f"has {len(layers)} letters; allowed: up to {MAX_LETTERS}")
    if not count:
        raise _wrong(pattern, f"has no layers; allowed: letters from {allowed}")
    readers = [place for place, layer in enumerate(layers) if LAYERS[layer.kind].reads_memory]
    for number, place in enumerate(readers):
        layers[place] = replace(layers[place], reader=number)
    return tuple(layers)


def without_clvr(pattern: str) -> str:
    """The pattern of the base model: no side letters, no spaces. Keeps the `|` of a layout."""
    sides = LAYERS.of_role("side")
    return "".join(letter for letter in pattern if letter not in sides and not letter.isspace())


def base_pattern(pattern: str) -> str:
    """The pattern of the base model, with the letters that others grew from."""
    base = without_clvr(pattern)
    return "".join(LAYERS[letter].grows or letter if letter != "|" else letter for letter in base)


def num_layers(pattern: str) -> int:
    """Number of transformers layers (a mixer and a feed-forward) of the pattern."""
    return len({layer.number for layer in parse_pattern(pattern) if layer.numbered})


def hops(model: ModelConfig) -> dict[int, tuple[int, ...]]:
    """Returns how many experts compute a position in each hop, by moe index."""
    layers = parse_pattern(model.hybrid_layer_pattern)
    routed = [layer for layer in layers if LAYERS[layer.kind].routed]
    return {layer.known_number: LAYERS[layer.kind].hops(model) for layer in routed}


def route_width(model: ModelConfig) -> int:
    """Returns the width of a row of routes: the most experts that any layer takes, all hops
    together."""
    taken = [sum(of_layer) for of_layer in hops(model).values()]
    return max(taken, default=model.language.moe_router_topk)


def experts_needed(model: ModelConfig) -> int:
    """Returns how many experts a layer must keep so that every position finds what it takes: those
    of the larger hop, or of all hops where these must differ."""
    needed = [model.language.moe_router_topk]
    for layer in parse_pattern(model.hybrid_layer_pattern):
        kind = LAYERS[layer.kind]
        if kind.routed:
            needed.append((sum if kind.hops_differ(model) else max)(kind.hops(model)))
    return max(needed)


def memories_of_pairs(model: ModelConfig) -> dict[int, Memory]:
    """Returns the memory that the look (`L`) of each pair reads; empty if no look is built."""
    read = look_memories(model)
    layers = parse_pattern(model.hybrid_layer_pattern) if read else ()
    return {
        layer.known_pair: read[layer.known_reader]
        for layer in layers
        if LAYERS[layer.kind].key == LOOKS and layer.reader is not None
    }


def modules_of(model: ModelConfig) -> list[str]:
    """Returns those of `MODULES` that the model has."""
    kinds = [LAYERS[layer.kind] for layer in parse_pattern(effective_pattern(model))]
    sees, routed = model.vision is not None, any(kind.routed for kind in kinds)
    has = {
        "vision": sees,
        "projector": sees,
        "language": True,
        "experts": routed,
        "router": routed,
        "clvr": bool(memories(model)),
        "avm": any(kind.key == "queries" for kind in kinds),
    }
    return [module for module in MODULES if has[module]]


def effective_pattern(model: ModelConfig) -> str:
    """The pattern that is built: with nothing to look at, looks and injects are dropped."""
    pattern = model.hybrid_layer_pattern
    return pattern if memories(model) else without_clvr(pattern)


def model_stages(run: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run: `stages` of the effective pattern, balanced by what each letter, the
    vision model and the output layer cost. A layout is written for the model's full pattern, so
    it is checked against that before the looks are dropped."""
    model, parallel = run.model, run.parallel
    pattern, layout = effective_pattern(model), parallel.pipeline_model_parallel_layout
    size = parallel.pipeline_model_parallel_size
    size *= parallel.virtual_pipeline_model_parallel_size or 1
    if layout is not None:
        _same_layers(model.hybrid_layer_pattern, layout)
        layout = layout if pattern == model.hybrid_layer_pattern else without_clvr(layout)
    return stages(pattern, size, layout, costs(run))


def _squeeze(pattern: str) -> str:
    return "".join(pattern.split())


def _same_layers(pattern: str, layout: str) -> None:
    _check_length("pipeline_model_parallel_layout", layout)
    expected, found = _squeeze(pattern), _squeeze(layout).replace("|", "")
    if expected == found:
        return
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    raise ConfigError(
        f"pipeline_model_parallel_layout {brief(layout)} is not hybrid_layer_pattern "
        f"{brief(pattern)} with | added: letter {at + 1} is {found[at : at + 1] or 'missing'}, "
        f"allowed: {expected[at : at + 1] or 'nothing more'}"
    )


def stages(
    pattern: str, size: int, layout: str | None = None, cost: Costs | None = None
) -> tuple[Stage, ...]:
    """Deals the pattern's sub-layers to `size` stages, by `layout` or balanced.

    Without a layout the most expensive stage is as cheap as possible; among such splits the
    evenest is taken (least sum of squares), and of equals the one with more boundaries between
    an L and its J. Every stage gets a numbered layer. In a layout the first stage may be empty (it
    has the embedding and the vision model) and so may the last (it has the output layer), but
    no other.

    Raises ConfigError when the layout is not this pattern, its number of stages is not
    `size`, or there are fewer sub-layers than stages.
    """
    layers, cost = parse_pattern(pattern), cost or Costs()
    if size < 1:
        raise ConfigError(f"pipeline_model_parallel_size {size}; allowed: 1 or more")
    if layout is None:
        cuts = list(
            _balanced_cuts(layers, size, tuple(cost.letters.items()), cost.first, cost.last)
        )
    else:
        _same_layers(pattern, layout)
        parts = _squeeze(layout).split("|")
        if len(parts) != size:
            raise ConfigError(
                f"pipeline_model_parallel_layout {brief(layout)} has {len(parts)} stages; "
                f"allowed: pipeline_model_parallel_size {size}, virtual stages counted"
            )
        for index, part in enumerate(parts[1:-1], start=1):
            if not part:
                raise ConfigError(
                    f"pipeline_model_parallel_layout {brief(layout)}: stage {index} of "
                    f"{len(parts)} is empty; allowed: an empty first or last stage"
                )
        cuts = [0]
        for part in parts:
            cuts.append(cuts[-1] + len(part))
    bounds = enumerate(pairwise(cuts))
    return tuple(Stage(index, layers[start:stop]) for index, (start, stop) in bounds)


@lru_cache(maxsize=64)  # a search over layouts asks for the same few thousands of times
def _balanced_cuts(
    layers: tuple[Layer, ...],
    size: int,
    letters: tuple[tuple[str, float], ...],
    first: float,
    last: float,
) -> tuple[int, ...]:
    """Boundaries 0 = c0 < c1 < ... < c_size = len(layers) of the balanced split. `letters`, `first`
    and `last` are the fields of the costs."""
    cost = Costs(dict(letters), first, last)
    done, held = [0.0], [0]  # of the first i sub-layers: cost, and how many are numbered
    waiting = [False]  # waiting[i]: a boundary after i sub-layers is between an L and its J
    in_flight = 0
    for layer in layers:
        done.append(done[-1] + cost.letters[layer.kind])
        held.append(held[-1] + layer.numbered)
        pair = LAYERS[layer.kind].pair
        in_flight += (pair == "opens") - (pair == "closes")
        waiting.append(in_flight > 0)
    if size > held[-1]:
        raise ConfigError(
            f"pipeline_model_parallel_size {size} is more than the {held[-1]} numbered "
            f"layers of hybrid_layer_pattern (virtual stages counted); allowed: 1 to {held[-1]}"
        )
    # For the best way to deal the first i sub-layers to the stages so far: largest[i] stage,
    # then best[i]: (minus the sum of squares, boundaries that split a pair, cuts) among the
    # ways whose stages are within the largest of all. Both are optimal for every prefix.
    end = len(layers)

    def of_stage(stage: int, start: int, stop: int) -> float:
        return (
            done[stop] - done[start] + cost.first * (stage == 0) + cost.last * (stage == size - 1)
        )

    largest: dict[int, float] = {0: 0.0}
    for stage in range(size):
        reached: dict[int, float] = {}
        for stop in range(1, end + 1):
            for start in range(stop - 1, -1, -1):
                here = of_stage(stage, start, stop)
                if here >= reached.get(stop, math.inf):
                    break  # an earlier start only makes this stage larger
                if start in largest and held[start] < held[stop]:
                    before = max(largest[start], here)
                    reached[stop] = min(reached.get(stop, math.inf), before)
        largest = reached
    limit = largest[end] * (1 + 1e-9)
    best: dict[int, tuple[float, int, list[int]]] = {0: (0.0, 0, [0])}
    for stage in range(size):
        longer: dict[int, tuple[float, int, list[int]]] = {}
        for start, (evenness, splits, cuts) in best.items():
            for stop in range(start + 1, end + 1):
                here = of_stage(stage, start, stop)
                if here > limit:
                    break
                score = evenness - here * here, splits + waiting[stop]
                if held[start] < held[stop] and (stop not in longer or score > longer[stop][:2]):
                    longer[stop] = *score, [*cuts, stop]
        best = longer
    return tuple(best[end][2])
