"""FLOPs of matrix products: the counter that every kind of layer reports to.

Counted are matrix products, two operations a multiply-add, as torch.utils.flop_counter counts
them; not norms, activations, the short convolution, routing and the optimizer.

The backward pass of a linear has one product for the gradient of its weight, if it learns, and one
for the gradient of its input, if anything before it learns. A product of two activations has one
for each. The same count serves the balanced pipeline split, MFU and the comparison with what torch
executes; `Workload` says how many rows there are and which of them it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig

Linear = tuple[int, int]  # inputs, outputs


def products(linears: Iterable[Linear], rows: float) -> float:
    """FLOPs of this many rows times the weights of each linear."""
    return 2.0 * rows * sum(inputs * outputs for inputs, outputs in linears)


def causal_pairs(tokens: int) -> float:
    """Pairs (query, key) of a sample; a position sees itself and those before it."""
    return tokens * (tokens + 1) / 2


@dataclass(frozen=True)
class MemoryRows:
    """Rows of one vision memory.

    Attributes:
        patches: patches that its projection sees.
        rows: rows that a look projects to keys and values, padding included.
        pairs: (position, patch) of one look.
        coordinate_rows: rows whose coordinates are added to the keys.
        slot_pairs: (slot, patch) of one glimpse.
        image_patches, image_slots: (patch, image) and (slot, image) of one glimpse, where samples
            have several images to choose from.
    """

    patches: int = 0
    rows: int = 0
    pairs: float = 0.0
    coordinate_rows: int = 0
    slot_pairs: float = 0.0
    image_patches: float = 0.0
    image_slots: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Rows and pairs that one microbatch brings.

    Attributes:
        tokens: rows of every linear of the language stack.
        logits: rows of the output layer.
        attention_pairs: (query, key) of one layer.
        tiles: tiles that the ViT sees; `stream_tiles` of them enter the stream.
        memories: by name, those that a look or a glimpse reads.
        queries, slots: rows of a glimpse's linears (letter Q).
        mixing: letter -> FLOPs (forward, backward) of one layer's mixing over positions, for kinds
            that compute it by a rule of their own (`LayerKind.mixing`).
        attention_backward: FLOPs of attention's backward pass over those of its forward pass.
        executed: count also what nobody asked for: the input gradients that megatron-core's
            linears always compute, and the passes that recomputation runs again.
    """

    tokens: int
    logits: int = 0
    attention_pairs: float = 0.0
    tiles: int = 0
    stream_tiles: int = 0
    memories: Mapping[str, MemoryRows] = field(default_factory=dict)
    queries: int = 0
    slots: int = 0
    mixing: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    attention_backward: float = 2.0
    executed: bool = False


@dataclass
class Flops:
    """FLOPs of one part of the model: forward, backward, and forward again for the backward
    pass."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again


@dataclass
class Counter:
    """Adds up the FLOPs of a microbatch, part by part, in the order of the forward pass.

    Attributes:
        flows: whether the hidden state where the count has come to depends on what learns.
        memory_flows: by name of a vision memory, the same of it.
        reader: `Layer.reader` of the layer that is counted.
        mixed: part -> forward FLOPs that mix positions, which `core_attn` computes again.
    """

    run: RunConfig
    work: Workload
    flows: bool = False
    memory_flows: Mapping[str, bool] = field(default_factory=dict)
    reader: int | None = None
    parts: dict[str, Flops] = field(default_factory=dict)
    mixed: dict[str, float] = field(default_factory=dict)

    def trains(self, module: str) -> bool:
        """Whether the module's own weights learn."""
        return self.run.trains(module)

    def normed(self) -> bool:
        """Whether the output of a norm on the hidden state depends on what learns."""
        return self.flows or self.trains("language")

    def linear(
        self,
        part: str,
        linear: Linear,
        rows: float,
        module: str = "language",
        *,
        flows: bool,
        spare: str = "input",
        adapter: bool = False,
    ) -> bool:
        """Counts one linear and returns whether its output depends on what learns.

        Args:
            flows: whether its input depends on what learns.
            spare: gradients that it computes whether anyone asks or not, once it computes any:
                that of its "input", of its "weight" as well, or "none".
            adapter: LoRA stands beside it, if it adapts the module.
        """
        of, forward, learns = self.part(part), products([linear], rows), self.trains(module)
        of.forward += forward
        wasted = spare if self.work.executed and (flows or learns) else "none"
        of.backward += forward * (learns or wasted == "weight")
        of.backward += forward * (flows or wasted != "none")
        if adapter and self.run.lora.adapts(module):
            rank, learns = self.run.lora.lora_rank, True
            assert rank is not None  # something is adapted
            down, up = (products([(n, rank)], rows) for n in linear)
            of.forward += down + up
            of.backward += down + up + up + down * flows
        return flows or learns

    def chain(self, part: str, linears: Iterable[Linear], *, adapter: bool = True) -> bool:
        """Counts a norm's output going through linears, one after the other; returns whether the
        last output depends on what learns."""
        flows = self.normed()
        for linear in linears:
            flows = self.linear(part, linear, self.work.tokens, flows=flows, adapter=adapter)
        return flows

    def mix(self, part: str, forward: float, backward: float, flows: bool) -> None:
        """Counts products of activations; `flows`: whether they depend on what learns."""
        of = self.part(part)
        of.forward += forward
        of.backward += backward * flows
        self.mixed[part] = self.mixed.get(part, 0.0) + forward

    def mixer(self, part: str, into: Linear, out: Linear, mixing: tuple[float, float]) -> bool:
        """Counts a projection, the mixing of positions (FLOPs forward and backward), and the
        projection back; returns whether the output depends on what learns."""
        tokens = self.work.tokens
        flows = self.linear(part, into, tokens, flows=self.normed(), adapter=True)
        self.mix(part, *mixing, flows)
        return self.linear(part, out, tokens, flows=flows, adapter=True)

    def again(self, part: str, forward: float) -> None:
        """Counts a forward pass that recomputation repeats, if its output has a gradient."""
        if self.work.executed and self.flows:
            self.part(part).again += forward

    def forward(self) -> dict[str, tuple[float, float]]:
        """part -> FLOPs of the forward pass so far, and how many of them mix positions."""
        return {name: (of.forward, self.mixed.get(name, 0.0)) for name, of in self.parts.items()}

    def part(self, name: str) -> Flops:
        return self.parts.setdefault(name, Flops())
