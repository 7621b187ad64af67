"""FLOPs of a microbatch, counted product by product; freezing and LoRA included.

Each kind of layer counts its own products (config/layers/); this file walks the model. The same
walk counts the FLOPs that training asks for, or those that our kernels execute: a test holds the
latter equal to torch's counter. MFU counts the former (`model_flops`).
"""

from __future__ import annotations

from megatron_mm.config import Layer, RunConfig, effective_pattern, parse_pattern, read_memories
from megatron_mm.config import cost as sizes
from megatron_mm.config.families import vision_family
from megatron_mm.config.layers.counting import Counter, Flops, Workload, products
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.layers.cross_entropy import blocks
from megatron_mm.model.recompute import Recompute
from megatron_mm.perf.work import executed, needed


def model_flops(run: RunConfig, batch: Microbatch, logits: int) -> dict[str, Flops]:
    """FLOPs that training on a microbatch asks for, by part; the same on every layout."""
    return count(run, needed(run, batch, logits))


def executed_flops(run: RunConfig, batch: Microbatch, logits: int) -> dict[str, Flops]:
    """FLOPs that our torch kernels compute for it on one rank."""
    return count(run, executed(run, batch, logits))


def total(parts: dict[str, Flops]) -> float:
    return sum(part.total for part in parts.values())


def count(run: RunConfig, work: Workload) -> dict[str, Flops]:
    """FLOPs by part: vision, projector, memory, output, and those that the layers of the pattern
    name (delta_net, attention, router, experts, looks)."""
    counter, recompute = Counter(run, work), Recompute.of(run.training)
    stream_flows = False
    if run.model.vision is not None:
        stream_flows, counter.memory_flows = _vision(counter, recompute)
    counter.flows = stream_flows or counter.trains("language")  # the embedding
    found: dict[tuple[str, int], bool] = {}  # what waits: whether it depends on what learns
    for layer in parse_pattern(effective_pattern(run.model)):
        counter.reader = layer.reader
        _layer(counter, layer, recompute, found)
    # The norm before the output layer belongs to the language model.
    output = sizes.output(run.model.language)
    counter.flows = counter.linear(
        "output", output, work.logits, flows=counter.normed(), spare="none"
    )
    if len(blocks(work.logits, output[1])) > 1:
        counter.again("output", products([output], work.logits))
    return counter.parts


def _layer(
    counter: Counter,
    layer: Layer,
    recompute: Recompute,
    found: dict[tuple[str, int], bool],
) -> None:
    """Counts one layer, and the part of it that the backward pass computes again."""
    kind = LAYERS[layer.kind]
    before, stream = counter.forward(), counter.flows
    flows = kind.flops(counter)
    if kind.pair == "closes":
        flows |= found.pop(layer.refinement)
    # A look is repeated with the block it stands in, before its refinement is added.
    counter.flows = stream or flows
    whole = recompute.sublayers is not None or recompute.repeats(kind.recompute)
    for part, (forward, mixed) in counter.forward().items():
        forward_before, mixed_before = before.get(part, (0.0, 0.0))
        if whole:
            counter.again(part, forward - forward_before)
        elif recompute.core_attn:
            counter.again(part, mixed - mixed_before)
    if kind.pair == "opens":
        found[layer.refinement] = flows
        counter.flows = stream


def _vision(counter: Counter, recompute: Recompute) -> tuple[bool, dict[str, bool]]:
    """Counts the vision side; returns whether the stream's image tokens, and each memory, depend on
    what learns."""
    run, work = counter.run, counter.work
    of = sizes.vision_linears(run.model)
    encoder = vision_family(run.model).cost(run.model.vision)
    of_tile = sizes.patches(run.model)
    inside, positions = of_tile * work.tiles, encoder.positions * work.tiles
    (embedding,) = of["patches"]
    norms = counter.trains("vision")
    flows = counter.linear("vision", embedding, inside, "vision", flows=False, spare="none")
    mixing = sizes.vision_attention(run.model, work.tiles)
    once = products(of["vit layer"], positions) + mixing
    if run.lora.adapts("vision"):
        rank = run.lora.lora_rank
        assert rank is not None  # the encoder is adapted
        once += sum(products([(a + b, rank)], positions) for a, b in of["vit layer"])
    for _ in range(encoder.layers):
        for number, linear in enumerate(of["vit layer"]):
            given = flows or norms
            flows |= counter.linear(
                "vision", linear, positions, "vision", flows=given, adapter=True
            )
            if number == 0:
                counter.mix("vision", mixing, work.attention_backward * mixing, flows)
        counter.flows = flows
        counter.again("vision", once * recompute.vision)
    stream = flows
    tokens = work.stream_tiles * of_tile / run.model.fusion.pixel_shuffle_factor**2
    for linear in of["projector"]:
        given = stream or counter.trains("projector")  # the norm, the bias
        stream = counter.linear("projector", linear, tokens, "projector", flows=given, adapter=True)
    memories = {}
    for memory in read_memories(run.model):
        if rows := work.memories[memory.name].patches:
            linear = sizes.memory_projection(run.model, memory)
            memories[memory.name] = counter.linear(
                "memory", linear, rows, "clvr", flows=flows, spare="none"
            )
    return stream, memories
