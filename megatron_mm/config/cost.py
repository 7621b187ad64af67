"""Costs of the pipeline's parts, for the balanced split: FLOPs by settings alone.

A cost is the forward pass over one sample: a full stream of `seq_length` tokens with one image of
the most tiles that are allowed. Backward costs twice as much again, except below a frozen ViT. The
products of a layer are counted by its kind (config/layers/); a real microbatch is counted from the
same sizes (perf/flops.py). Everything is a pure function of settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_mm.config.families import vision_family, vision_settings
from megatron_mm.config.layers.counting import (
    Counter,
    Linear,
    MemoryRows,
    Workload,
    causal_pairs,
    products,
)
from megatron_mm.config.layers.kinds import LAYERS, LayerKind
from megatron_mm.config.memories import Memory, look_memories, most_tiles, read_memories
from megatron_mm.config.settings import LoraConfig, RunConfig
from megatron_mm.config.settings_model import LanguageConfig, ModelConfig


@dataclass(frozen=True)
class Costs:
    """Costs of a sub-layer by its letter, and of what only the first and the last stage have.
    Unless given, a numbered layer costs 1 and the others nothing."""

    letters: dict[str, float] = field(
        default_factory=lambda: {letter: float(kind.numbered) for letter, kind in LAYERS.items()}
    )
    first: float = 0.0
    last: float = 0.0


def costs(run: RunConfig) -> Costs:
    """FLOPs of one forward pass; a frozen ViT, which has no backward pass, counts a third."""
    model, tokens = run.model, run.data.seq_length
    kinds = LAYERS.used(model.hybrid_layer_pattern)
    first = 0.0
    if model.vision is not None and run.parallel.vision_parallel != "replica":
        share = 1 / 3 if run.training.freeze_vision else 1.0
        first = share * vision(model, most_of_an_image(run))
    work = Workload(
        tokens=tokens,
        attention_pairs=causal_pairs(tokens),
        memories={memory.name: _memory_rows(run, memory) for memory in read_memories(model)},
        mixing={kind.letter: kind.mixing(run, tokens) for kind in kinds if kind.mixing},
    )
    bare = replace(run, lora=LoraConfig())  # adapters change the balance by nothing that matters
    letters = {kind.letter: _forward(kind, bare, work) for kind in kinds}
    return Costs(letters, first, last=products([output(model.language)], tokens))


def _memory_rows(run: RunConfig, memory: Memory) -> MemoryRows:
    """The memory of one image; the coordinates of its keys are left out, and glimpses, which follow
    from data: a query costs little beside the keys and values."""
    of = {"thumbnail": 1, "tiles": most_tiles(run), "pyramid": most_of_an_image(run)}
    seen = of[memory.tiles] * patches(run.model)
    return MemoryRows(rows=seen, pairs=run.data.seq_length * seen)


def _forward(kind: LayerKind, run: RunConfig, work: Workload) -> float:
    """FLOPs of one layer's forward pass; of a kind that reads a memory, the mean over those that
    are read."""
    reads = [memory.name for memory in look_memories(run.model)]
    readers = [reads.index(name) for name in work.memories] if kind.reads_memory else [None]
    spent = 0.0
    for reader in readers:
        counter = Counter(run, work, reader=reader)
        kind.flops(counter)
        spent += sum(forward for forward, _ in counter.forward().values())
    return spent / max(1, len(readers))


def output(lm: LanguageConfig) -> Linear:
    """The output layer."""
    return lm.hidden_size, lm.vocab_size


def vision_linears(model: ModelConfig) -> dict[str, tuple[Linear, ...]]:
    """Linears of the vision side. `patches` and `vit layer` see the positions of a tile,
    `projector` the tokens of the stream."""
    fusion, hidden = model.fusion, model.language.hidden_size
    vit = vision_settings(model)
    encoder, width = vision_family(model).cost(vit), vit.vision_hidden_size
    return {
        "patches": (encoder.embedding,),
        "vit layer": encoder.layer,
        "projector": ((width * fusion.pixel_shuffle_factor**2, hidden), (hidden, hidden)),
    }


def memory_projection(model: ModelConfig, memory: Memory) -> Linear:
    """The projection of a memory, which sees its patches."""
    return vision_settings(model).vision_hidden_size, memory.width


def vision_attention(model: ModelConfig, tiles: int) -> float:
    """FLOPs of one layer's attention: every position of a tile with every other."""
    encoder = vision_family(model).cost(model.vision)
    return 4.0 * tiles * encoder.positions**2 * encoder.width


def vision(model: ModelConfig, tiles: int) -> float:
    """FLOPs of the encoder over this many tiles."""
    of, encoder = vision_linears(model), vision_family(model).cost(model.vision)
    layer = products(of["vit layer"], tiles * encoder.positions) + vision_attention(model, tiles)
    return encoder.layers * layer + products(of["patches"], tiles * patches(model))


def patches(model: ModelConfig) -> int:
    """Patches of one tile."""
    return vision_family(model).grid(model.vision, None).patches


def most_of_an_image(run: RunConfig, images: int = 1) -> int:
    """Returns the most tiles of each of `images` images of a row, its thumbnail among them."""
    cells = most_tiles(run, images)
    return cells + int(run.data.use_thumbnail and cells > 1)
