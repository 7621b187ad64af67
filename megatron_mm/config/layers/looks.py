"""`L` and `J`: a look at the vision memory, and the injection of what it found (CLVR)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mm.config.layers.counting import Counter
from megatron_mm.config.layers.kinds import LayerKind
from megatron_mm.config.memories import look_memories
from megatron_mm.config.rules import divides

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig

COORDINATE_FREQUENCIES = 6  # 2^0 .. 2^5 half periods over the image


def _flops(counter: Counter) -> bool:
    """Query, keys and values, the keys' coordinates, the mixing and the projection back."""
    work, model = counter.work, counter.run.model
    hidden, fusion, learns = model.language.hidden_size, model.fusion, counter.trains("clvr")
    assert counter.reader is not None
    memory = look_memories(model)[counter.reader]
    held, memory_flows = work.memories[memory.name], counter.memory_flows.get(memory.name, False)
    width = fusion.clvr_num_attention_heads * fusion.clvr_kv_channels
    flows = counter.linear(
        "looks", (hidden, width), work.tokens, "clvr", flows=counter.flows or learns
    )
    key_value, seen = (memory.width, 2 * width), memory_flows or learns
    flows |= counter.linear("looks", key_value, held.rows, "clvr", flows=seen)
    if memory.coordinates:
        features = 4 * COORDINATE_FREQUENCIES, width
        counter.linear("looks", features, held.coordinate_rows, "clvr", flows=False)
    mixing = 4.0 * held.pairs * width
    counter.mix("looks", mixing, work.attention_backward * mixing, flows)
    return counter.linear("looks", (width, hidden), work.tokens, "clvr", flows=flows)


def _check(run: RunConfig) -> None:
    model = run.model
    if not look_memories(model):
        return  # the looks are not built
    heads, tp = model.fusion.clvr_num_attention_heads, run.parallel.tensor_model_parallel_size
    divides("clvr_num_attention_heads", heads, "tensor_model_parallel_size", tp)


LOOK = LayerKind(
    letter="L",
    title="look at the image",
    role="side",
    pair="opens",
    key="looks",
    module="megatron_mm.model.layers.clvr.Look",
    flops=_flops,
    reads_memory=True,
    check=_check,
)
INJECTION = LayerKind(
    letter="J",
    title="inject what was seen",
    role="side",
    pair="closes",
    key="looks",
    flops=lambda counter: False,
)
