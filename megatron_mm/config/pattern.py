"""The layer pattern: which sub-layers a model has, which stage holds them, what travels.

Letters: `G` gated DeltaNet, `*` gated attention, `E` mixture of experts, `L` look at the
vision memory, `J` inject what a look found. Spaces mean nothing. A *layout* is the same
pattern with `|` at the pipeline stage boundaries.

A transformers "layer" is a mixer (`G` or `*`) and the `E` after it; here each letter is
one sub-layer. `L` and `J` are not numbered, so adding them never shifts checkpoint keys.
Everything in this file is a pure function of strings and tuples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megatron_mm.config.cost import Costs, costs
from megatron_mm.config.memories import memories
from megatron_mm.config.settings import ModelConfig, RunConfig
from megatron_mm.errors import ConfigError

MIXERS = "G*"
LETTERS = "G*ELJ"
UNIT = Costs()


@dataclass(frozen=True)
class Layer:
    """One sub-layer. `number`: the transformers layer that a G, * or E belongs to.
    `pair`: which look/inject pair an L or J belongs to. The other of the two is None."""

    kind: str
    number: int | None = None
    pair: int | None = None


@dataclass(frozen=True)
class Stage:
    """The consecutive sub-layers that one pipeline stage holds. With virtual stages, stage i
    is on pipeline rank i % pipeline_model_parallel_size."""

    index: int
    layers: tuple[Layer, ...]


def _wrong(pattern: str, reason: str) -> ConfigError:
    return ConfigError(f"hybrid_layer_pattern {pattern!r}: {reason}")


def parse_pattern(pattern: str) -> tuple[Layer, ...]:
    """Reads a model pattern. The k-th `L` is injected by the k-th `J`; several may wait.

    Raises ConfigError for an unknown letter, a mixer without its `E`, an `E` without its
    mixer, a `J` before its `L`, an `L` that is never injected, or no layers at all.
    Positions in messages count characters from 1, spaces included.
    """
    layers: list[Layer] = []
    mixers = looks = injects = 0
    open_mixer: tuple[str, int] | None = None  # the mixer that still waits for its E
    for position, kind in enumerate(pattern, start=1):
        here = f"{kind!r} at position {position}"
        if kind.isspace():
            continue
        if kind == "|":
            raise _wrong(
                pattern, f"{here} belongs in pipeline_model_parallel_layout, not in the model"
            )
        if kind not in LETTERS:
            raise _wrong(pattern, f"unknown letter {here}; allowed: {', '.join(LETTERS)}")
        if kind in MIXERS:
            if open_mixer:
                raise _wrong(pattern, f"{open_mixer[0]} needs an E before {here}")
            open_mixer = here, mixers
            layers.append(Layer(kind, number=mixers))
            mixers += 1
        elif kind == "E":
            if open_mixer is None:
                raise _wrong(pattern, f"{here} needs a mixer (G or *) of its own before it")
            layers.append(Layer(kind, number=open_mixer[1]))
            open_mixer = None
        elif kind == "L":
            layers.append(Layer(kind, pair=looks))
            looks += 1
        else:
            if injects == looks:
                raise _wrong(pattern, f"{here} has no L before it to inject")
            layers.append(Layer(kind, pair=injects))
            injects += 1
    if open_mixer:
        raise _wrong(pattern, f"{open_mixer[0]} needs an E after it")
    if injects < looks:
        raise _wrong(pattern, f"{looks} L but only {injects} J; every L needs a J after it")
    if not mixers:
        raise _wrong(pattern, f"has no layers; allowed: letters from {', '.join(LETTERS)}")
    return tuple(layers)


def without_clvr(pattern: str) -> str:
    """The pattern of the base model: no `L`, no `J`, no spaces. Keeps the `|` of a layout."""
    return "".join(letter for letter in pattern if letter not in "LJ" and not letter.isspace())


def num_layers(pattern: str) -> int:
    """How many transformers layers (mixer plus experts) the pattern has."""
    return sum(layer.kind in MIXERS for layer in parse_pattern(pattern))


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
    expected, found = _squeeze(pattern), _squeeze(layout).replace("|", "")
    if expected == found:
        return
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    raise ConfigError(
        f"pipeline_model_parallel_layout {layout!r} is not hybrid_layer_pattern {pattern!r} with "
        f"| added: letter {at + 1} is {found[at : at + 1] or 'missing'}, "
        f"allowed: {expected[at : at + 1] or 'nothing more'}"
    )


def stages(
    pattern: str, size: int, layout: str | None = None, cost: Costs = UNIT
) -> tuple[Stage, ...]:
    """Deals the pattern's sub-layers to `size` stages, by `layout` or balanced.

    Without a layout the most expensive stage is as cheap as possible; among such splits the
    evenest is taken (least sum of squares), and of equals the one with more boundaries between
    an L and its J. Every stage gets a G, * or E. In a layout the first stage may be empty (it
    has the embedding and the vision model) and so may the last (it has the output layer), but
    no other.

    Raises ConfigError when the layout is not this pattern, its number of stages is not
    `size`, or there are fewer sub-layers than stages.
    """
    layers = parse_pattern(pattern)
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
                f"pipeline_model_parallel_layout {layout!r} has {len(parts)} stages; "
                f"allowed: pipeline_model_parallel_size {size}, virtual stages counted"
            )
        for index, part in enumerate(parts[1:-1], start=1):
            if not part:
                raise ConfigError(
                    f"pipeline_model_parallel_layout {layout!r}: stage {index} of {len(parts)} is "
                    f"empty; allowed: an empty first or last stage"
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
    """Boundaries 0 = c0 < c1 < ... < c_size = len(layers) of the balanced split; `letters`, `first`
    and `last` are those of the costs."""
    cost = Costs(dict(letters), first, last)
    done, held = [0.0], [0]  # of the first i sub-layers: cost, and how many G, * and E
    waiting = [False]  # waiting[i]: a boundary after i sub-layers is between an L and its J
    in_flight = 0
    for layer in layers:
        done.append(done[-1] + cost.letters[layer.kind])
        held.append(held[-1] + (layer.kind in "G*E"))
        in_flight += (layer.kind == "L") - (layer.kind == "J")
        waiting.append(in_flight > 0)
    if size > held[-1]:
        raise ConfigError(
            f"pipeline_model_parallel_size {size} is more than the {held[-1]} G, * and E of "
            f"hybrid_layer_pattern (virtual stages counted); allowed: 1 to {held[-1]}"
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
        largest = {
            stop: min(
                max(before, of_stage(stage, start, stop))
                for start, before in largest.items()
                if held[start] < held[stop]
            )
            for stop in range(1, end + 1)
            if any(held[start] < held[stop] for start in largest)
        }
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
