"""`Q` and `V`: a glimpse at the place of an image that a token asks for, and the slots behind that
token which are shown what was found (active vision)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_mm.config.fields import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt
from megatron_mm.config.layers.counting import Counter
from megatron_mm.config.layers.kinds import LayerKind
from megatron_mm.config.memories import look_memories
from megatron_mm.config.objectives import declaration
from megatron_mm.config.rules import divides, require

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig
    from megatron_mm.config.settings_model import ModelConfig

PLACE = 3  # numbers that say where a query looks: y, x, scale
Side = Annotated[float, Bounds(gt=0, le=1)]  # of a window, as a share of the image's


@dataclass
class QuerySettings:
    query_grid: PositiveInt = 2
    """Slots along each side of a glimpse: a query token is followed by the square of this many
    slots, which show the cells of the window that it asks for."""
    query_spread: PositiveFloat = 0.5
    """Width of a slot's Gaussian over places, as a share of its cell."""
    query_scale_spread: PositiveFloat = 1.0
    """Width of a slot's Gaussian over the sizes of patches, in octaves."""
    query_min_scale: Side = 0.08
    """Side of the smallest window that can be asked for, as a share of the image's."""
    query_first_scale: Side = 0.8
    """Floor of the windows at the first step: a smaller one is not given. A place is not learnt
    from the answers alone if windows are small from the start. Places that are words have none."""
    query_anneal_share: NonNegativeFloat = 0.7
    """Share of train_iters over which the floor falls from query_first_scale to query_min_scale. It
    never rises again: a model that was trained goes on with its own."""
    query_box_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the distance to the boxes of the rows' `looks` beside the loss of a token, in
    supervised fine-tuning."""
    query_place: Literal["hidden", "tokens", "random", "oracle"] = "hidden"
    """Source of the place of a look. hidden: the hidden state of the query; tokens: three words
    that the model writes before it. Controls: random, a place that follows from the query's
    position, with the smallest window; oracle, the box of the row's `looks`."""
    max_queries: PositiveInt = 32
    """Queries that one sample may have; in generation, further ones are ordinary tokens."""

    @property
    def slots(self) -> int:
        """Slots behind a query."""
        return self.query_grid**2


def query_settings(model: ModelConfig) -> QuerySettings | None:
    """Returns the settings of the letter Q; None if no glimpse is built."""
    if QUERY.letter not in model.hybrid_layer_pattern or not look_memories(model):
        return None
    return model.layer_settings(QUERY.letter)


def smallest_window(settings: QuerySettings, done: float) -> float:
    """Returns the floor of the windows' sides, as a share of the image's: it falls in equal ratios
    from query_first_scale to query_min_scale, so that each size of window has as many steps.

    Args:
        done: the share of a run's steps that are done.
    """
    begin, end, share = (
        settings.query_first_scale,
        settings.query_min_scale,
        settings.query_anneal_share,
    )
    return end if done >= share else begin * (end / begin) ** (done / share)


def window(place: Sequence[float]) -> tuple[float, float, float, float]:
    """Returns left, top, right, bottom of the window at (y, x, scale), within the image; all are
    shares of it."""
    y, x, scale = place
    low = [max(0.0, at - scale / 2) for at in (x, y)]
    high = [min(1.0, at + scale / 2) for at in (x, y)]
    return low[0], low[1], high[0], high[1]


def _flops(counter: Counter) -> bool:
    """Queries, the places they ask for, keys and values, the mixing and the projection back."""
    work, model = counter.work, counter.run.model
    hidden, fusion, learns = model.language.hidden_size, model.fusion, counter.trains("avm")
    assert counter.reader is not None
    memory = look_memories(model)[counter.reader]
    held, memory_flows = work.memories[memory.name], counter.memory_flows.get(memory.name, False)
    width = fusion.clvr_num_attention_heads * fusion.clvr_kv_channels
    asks = counter.flows or learns
    counter.linear("queries", (hidden, PLACE), work.queries, "avm", flows=asks, spare="none")
    flows = counter.linear("queries", (hidden, width), work.queries, "avm", flows=asks)
    key_value, seen = (memory.width, 2 * width), memory_flows or learns
    flows |= counter.linear("queries", key_value, held.rows, "avm", flows=seen)
    means = 2.0 * held.image_patches * width  # which patch is of which image learns nothing
    mixing = (4.0 * held.slot_pairs + 2.0 * held.image_slots) * width
    counter.mix("queries", mixing + means, 2.0 * mixing + means, flows)
    return counter.linear("queries", (width, hidden), work.slots, "avm", flows=flows)


def _check(run: RunConfig) -> None:
    model = run.model
    settings = query_settings(model)
    if settings is None:
        return  # no glimpse is built
    heads, tp = model.fusion.clvr_num_attention_heads, run.parallel.tensor_model_parallel_size
    divides("clvr_num_attention_heads", heads, "tensor_model_parallel_size", tp)
    first, least = settings.query_first_scale, settings.query_min_scale
    allowed = f"query_min_scale {least} to 1"
    require(first >= least, "query_first_scale", first, allowed)
    weight, spoken = settings.query_box_loss_coeff, settings.query_place == "tokens"
    allowed = "0 under query_place tokens, whose places are learnt as words"
    require(not (spoken and weight), "query_box_loss_coeff", weight, allowed)
    allowed = f"0 with objective {run.training.objective}, whose loss is no mean over tokens"
    fits = declaration(run).mean_over_tokens or not weight
    require(fits, "query_box_loss_coeff", weight, f"{allowed}; reward look_iou")


QUERY = LayerKind(
    letter="Q",
    title="glimpse at the place asked for",
    role="side",
    pair="opens",
    key="queries",
    module="megatron_mm.model.layers.glimpse.Glimpse",
    flops=_flops,
    reads_memory=True,
    settings=QuerySettings,
    check=_check,
)
SHOWING = LayerKind(
    letter="V",
    title="show what the glimpse found",
    role="side",
    pair="closes",
    key="queries",
    flops=lambda counter: False,
)
