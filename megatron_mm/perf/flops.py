"""FLOPs of a microbatch, counted product by product, with what is frozen and what LoRA adds.

Counted are matrix products, two operations a multiply-add, as torch.utils.flop_counter counts
them; not norms, activations, the short convolution, routing and the optimizer.

Of a linear, the backward pass has a product for its weight's gradient, if it learns, and one for
its input's, if anything before it learns; of two activations one for each. `Work` says how many
rows there are, and whether to count what is asked for or what our kernels compute: a test holds
the latter equal to torch's counter. MFU is of what is asked for (`model_flops`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mm.config import RunConfig, effective_pattern
from megatron_mm.config import cost as sizes
from megatron_mm.config.cost import products
from megatron_mm.config.families import Linear, vision_family
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.layers.clvr import COORDINATE_FREQUENCIES
from megatron_mm.model.recompute import Recompute
from megatron_mm.perf.work import Work, executed, needed


@dataclass
class Flops:
    """Of one part of the model, forward, backward, and forward again for the backward pass."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again


def model_flops(run: RunConfig, batch: Microbatch, logits: int) -> dict[str, Flops]:
    """What training on a microbatch asks for, by part; the same on every layout."""
    return count(run, needed(run, batch, logits))


def executed_flops(run: RunConfig, batch: Microbatch, logits: int) -> dict[str, Flops]:
    """What our torch kernels compute for it on one rank."""
    return count(run, executed(run, batch, logits))


def total(parts: dict[str, Flops]) -> float:
    return sum(part.total for part in parts.values())


@dataclass
class _Counter:
    """
    Attributes:
        flows: whether the hidden state where the count has come to depends on what learns.
    """

    run: RunConfig
    work: Work
    flows: bool = False
    parts: dict[str, Flops] = field(default_factory=dict)

    def trains(self, module: str) -> bool:
        """Whether the module's own weights learn."""
        frozen = getattr(self.run.training, f"freeze_{module}")
        return not (frozen or self.run.lora.adapts(module))

    def linear(
        self,
        part: str,
        linear: Linear,
        rows: float,
        module: str,
        *,
        flows: bool,
        spare: str = "input",
        adapter: bool = False,
    ) -> bool:
        """Count one; whether its output depends on what learns.

        Args:
            flows: the same of its input.
            spare: which gradients it computes whether anyone asks or not, once it computes any:
                its "input"'s, its "weight"'s as well, or "none".
            adapter: LoRA stands beside it, if it adapts the module.
        """
        of, forward, learns = self._part(part), products([linear], rows), self.trains(module)
        of.forward += forward
        wasted = spare if self.work.executed and (flows or learns) else "none"
        of.backward += forward * (learns or wasted == "weight")
        of.backward += forward * (flows or wasted != "none")
        if adapter and self.run.lora.adapts(module):
            rank, learns = self.run.lora.lora_rank, True
            down, up = (products([(n, rank)], rows) for n in linear)
            of.forward += down + up
            of.backward += down + up + up + down * flows
        return flows or learns

    def mix(self, part: str, forward: float, backward: float, flows: bool) -> None:
        """Count products of activations."""
        of = self._part(part)
        of.forward += forward
        of.backward += backward * flows

    def again(self, part: str, forward: float) -> None:
        """Count a forward pass that recomputation repeats, if its output has a gradient."""
        if self.work.executed and self.flows:
            self._part(part).again += forward

    def _part(self, name: str) -> Flops:
        return self.parts.setdefault(name, Flops())


def count(run: RunConfig, work: Work) -> dict[str, Flops]:
    """By part: vision, projector, memory, delta_net, attention, router, experts, looks, output."""
    counter, recompute = _Counter(run, work), Recompute.of(run.training)
    memory_flows = stream_flows = False
    if run.model.vision is not None:
        stream_flows, memory_flows = _vision(counter, recompute)
    counter.flows = stream_flows or counter.trains("language")  # the embedding
    found: list[bool] = []  # what waiting looks found: whether it depends on what learns
    whole = recompute.sublayers is not None
    layers = {"G": _delta_net, "*": _attention, "E": _experts}
    parts = {"G": ("delta_net",), "*": ("attention",), "E": ("router", "experts")}
    for letter in effective_pattern(run.model):
        if letter == "L":
            before = _forward(counter, ("looks",))
            core, flows = _look(counter, memory_flows)
            found.append(flows)
            # A look whose find nobody has added yet is repeated with the block it stands in.
            kept, counter.flows = counter.flows, counter.flows or flows
            spent = _forward(counter, ("looks",)) - before
            counter.again("looks", spent if whole else core * recompute.core_attn)
            counter.flows = kept
        elif letter == "J":
            counter.flows |= found.pop(0)
        elif letter in layers:
            names = parts[letter]
            before = {name: _forward(counter, (name,)) for name in names}
            core = layers[letter](counter)
            for name in names:
                spent = _forward(counter, (name,)) - before[name]
                if whole or (letter == "E" and recompute.moe):
                    counter.again(name, spent)
                elif recompute.core_attn:
                    counter.again(name, core)
    (output,) = sizes.language_linears(run.model.language)["output"]
    flows = counter.flows or counter.trains("language")  # the norm before it
    counter.linear("output", output, work.logits, "language", flows=flows)
    return counter.parts


def _forward(counter: _Counter, parts: tuple[str, ...]) -> float:
    return sum(counter.parts[name].forward for name in parts if name in counter.parts)


def _vision(counter: _Counter, recompute: Recompute) -> tuple[bool, bool]:
    """Whether the stream's image tokens, and the memory, depend on what learns."""
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
    if not work.patches:
        return stream, False
    (linear,) = of["memory"]
    memory = counter.linear("memory", linear, work.patches, "clvr", flows=flows, spare="none")
    return stream, memory


def _delta_net(counter: _Counter) -> float:
    """The core's FLOPs forward: of what `core_attn` repeats."""
    work = counter.work
    into, out = sizes.language_linears(counter.run.model.language)["G"]
    given = counter.flows or counter.trains("language")
    flows = counter.linear("delta_net", into, work.tokens, "language", flows=given, adapter=True)
    counter.mix("delta_net", work.delta_forward, work.delta_backward, flows)
    counter.flows = counter.linear(
        "delta_net", out, work.tokens, "language", flows=flows, adapter=True
    )
    return work.delta_forward


def _attention(counter: _Counter) -> float:
    """See `_delta_net`."""
    work, lm = counter.work, counter.run.model.language
    into, out = sizes.language_linears(lm)["*"]
    given = counter.flows or counter.trains("language")
    flows = counter.linear("attention", into, work.tokens, "language", flows=given, adapter=True)
    mixing = sizes.attention(lm, work.attention_pairs)
    counter.mix("attention", mixing, work.attention_backward * mixing, flows)
    counter.flows = counter.linear(
        "attention", out, work.tokens, "language", flows=flows, adapter=True
    )
    return mixing


def _experts(counter: _Counter) -> float:
    """Router, chosen experts, the shared one and its gate. The chosen ones are one function, which
    takes the gradients of all it was given if it takes any."""
    tokens = counter.work.tokens
    of = sizes.language_linears(counter.run.model.language)
    given = counter.flows or counter.trains("language")
    flows = counter.linear("router", *of["router"], tokens, "router", flows=given, spare="weight")
    inside = flows or given
    for number, linear in enumerate(of["experts"]):
        first = number % 2 == 0  # the products of gate and up; their input is the token
        asked = given if first and not counter.work.executed else inside or given
        counter.linear("experts", linear, tokens, "language", flows=asked)
    shared = given
    for linear in of["shared"]:
        shared = counter.linear("experts", linear, tokens, "language", flows=shared, adapter=True)
    (gate,) = of["shared gate"]
    counter.linear("experts", gate, tokens, "language", flows=given, spare="none")
    counter.flows = inside or shared or counter.trains("language")
    return 0.0


def _look(counter: _Counter, memory_flows: bool) -> tuple[float, bool]:
    """(the core's FLOPs forward, whether what it finds depends on what learns)."""
    work, model = counter.work, counter.run.model
    of, learns = sizes.vision_linears(model), counter.trains("clvr")
    query, out = of["L"]
    (memory,) = of["L memory"]
    flows = counter.linear("looks", query, work.tokens, "clvr", flows=counter.flows or learns)
    flows |= counter.linear("looks", memory, work.memory_rows, "clvr", flows=memory_flows or learns)
    if model.fusion.memory_coordinates:
        features = (4 * COORDINATE_FREQUENCIES, query[1])
        counter.linear("looks", features, work.memory_rows, "clvr", flows=False)
    mixing = sizes.look(model, work.look_pairs)
    counter.mix("looks", mixing, work.attention_backward * mixing, flows)
    return mixing, counter.linear("looks", out, work.tokens, "clvr", flows=flows)
