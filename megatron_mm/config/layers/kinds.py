"""Kinds of layers, one for each letter of the layer pattern.

A kind has two halves. The torch-free half is a `LayerKind`, in this folder for the built-in
letters; the torch half is a module (`LayerKind.module`) beside the layer's mathematics. Everything
that walks the pattern (stages, costs, stack, planner, checks, report) asks the registry, so a new
letter is one file and one registration:

    LAYERS.register("M", LayerKind(letter="M", title="gated MLP", role="ffn", ...))

A run that uses it names the module that registers it in `plugins`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from megatron_mm.config.layers.counting import Counter
from megatron_mm.errors import ConfigError
from megatron_mm.plugins import Registry

if TYPE_CHECKING:
    from megatron_mm.config.settings import RunConfig
    from megatron_mm.config.settings_model import ModelConfig


def _nothing(run: RunConfig) -> tuple:
    return ()


def _never(model: ModelConfig) -> bool:
    return False


def _one_hop(model: ModelConfig) -> tuple[int, ...]:
    return (model.language.moe_router_topk,)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The torch-free half of a kind of layer.

    Attributes:
        letter: its letter in `hybrid_layer_pattern`.
        title: its name for people.
        role: how it is numbered. A "mixer" opens a transformers layer and a "ffn" closes it, with
            the same number; both are residual, behind a norm. A "side" is not numbered, so that
            adding it shifts no checkpoint key.
        key: the name under which the stack keeps it: `layers.{number}.{key}`, or
            `{key}.{pair}` for a side.
        flops: counts the products of one layer; returns whether its output depends on what learns.
        module: dotted path of the torch half, see model/layers/interface.py. None for a side that
            closes a pair: adding what was found needs no parameters.
        pair: a side "opens" a pair (its output waits) or "closes" one (adds it to the stream). The
            k-th that closes adds what the k-th of the same key that opens found.
        reads_memory: it looks at the vision memory, which must travel to its stage.
        routed: it has routed experts; its number is their moe index.
        hops: of a routed kind, how many experts compute a position, hop by hop.
        hops_differ: whether no expert may compute a position in two hops.
        reads_stream: `run` is also given the hidden state as it is before the norm.
        grows: the letter whose place it may take in a fine-tune. What it has beside that letter's
            parameters then starts new.
        settings: dataclass of its own settings, `model.layers.{letter}`; None if the language
            model's settings are enough.
        check: raises ConfigError if its sizes do not fit the run.
        fp8_features: (setting and its meaning, features on one rank) of both sides of each linear
            that computes in FP8.
        recompute: the module of `recompute_modules` that computes the whole layer again;
            `core_attn` is the torch half's own business.
        lora: the last names of the linears that get an adapter.
        mixing: (run, tokens) -> FLOPs (forward, backward) of its mixing over positions, if that
            follows a rule of its own and not the pairs of attention.
        executed_mixing: dotted path of (run, segments) -> the same for our torch kernels.
        hf_rows: dotted path of a tuple of convert.table.Row, the names of its parameters, for
            families that do not know the letter.
        hf_config: the keys that it writes into transformers' text config, over the family's.
        hf_keys: their names.
        hf_claims: (transformers' text config, layer) -> whether that layer is of this kind instead
            of the family's own.
        hf_settings: transformers' text config -> `settings` of its own, by name.
    """

    letter: str
    title: str
    role: Literal["mixer", "ffn", "side"]
    key: str
    flops: Callable[[Counter], bool]
    module: str | None = None
    pair: Literal["opens", "closes"] | None = None
    reads_memory: bool = False
    routed: bool = False
    hops: Callable[[ModelConfig], tuple[int, ...]] = _one_hop
    hops_differ: Callable[[ModelConfig], bool] = _never
    reads_stream: bool = False
    grows: str | None = None
    settings: type | None = None
    check: Callable[[RunConfig], Any] = _nothing
    fp8_features: Callable[[RunConfig], Iterable[tuple[str, int]]] = _nothing
    recompute: Literal["moe"] | None = None
    lora: tuple[str, ...] = ()
    mixing: Callable[[RunConfig, int], tuple[float, float]] | None = None
    executed_mixing: str | None = None
    hf_rows: str | None = None
    hf_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    hf_keys: tuple[str, ...] = ()
    hf_claims: Callable[[Mapping[str, Any], int], bool] | None = None
    hf_settings: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        for field, allowed in (
            ("role", ("mixer", "ffn", "side")),
            ("pair", ("opens", "closes", None)),
            ("recompute", ("moe", None)),
        ):
            value = getattr(self, field)
            if value not in allowed:
                words = ", ".join(map(str, allowed))
                raise ConfigError(f"letter {self.letter}: {field} is {value!r}; allowed: {words}")
        if (self.role == "side") != (self.pair is not None):
            raise ConfigError(
                f"letter {self.letter}: role is {self.role!r} and pair is {self.pair!r}; allowed: "
                "pair opens or closes with role side, none with role mixer or ffn"
            )
        if (self.module is None) != (self.pair == "closes"):
            raise ConfigError(
                f"letter {self.letter}: module is {self.module!r}; allowed: the dotted path of its "
                "torch half, or none with pair closes"
            )

    @property
    def numbered(self) -> bool:
        """Whether it is part of a transformers layer."""
        return self.role != "side"


class Layers(Registry[LayerKind]):
    """The registry of letters, with what is asked of all of them together."""

    def register(self, name: str, part: LayerKind | str) -> None:
        """Adds a letter.

        Raises:
            ConfigError: if the letter is taken, cannot stand in a pattern, or is not the kind's.
        """
        if len(name) != 1 or name.isspace() or name == "|":
            raise ConfigError(f"letter {name!r}; allowed: one character, no space and no |")
        if isinstance(part, LayerKind) and part.letter != name:
            raise ConfigError(f"letter {name!r} is registered with a kind of letter {part.letter}")
        super().register(name, part)

    def used(self, pattern: str) -> list[LayerKind]:
        """The kinds of a pattern, each once, in the order of registration."""
        return [self[letter] for letter in self if letter in pattern]

    def of_role(self, role: str) -> list[str]:
        """The letters of a role, in the order of registration."""
        return [letter for letter, kind in self.items() if kind.role == role]

    def of_pair(self, pair: str, key: str | None = None) -> list[str]:
        """The letters that open, or close, a pair: of this key, or of any."""
        return [
            letter for letter, kind in self.items() if kind.pair == pair and key in (None, kind.key)
        ]


_BUILT_IN = {
    "G": "delta_net.DELTA_NET",
    "*": "attention.ATTENTION",
    "E": "experts.EXPERTS",
    "L": "looks.LOOK",
    "J": "looks.INJECTION",
    "Q": "queries.QUERY",
    "V": "queries.SHOWING",
    "C": "cascade.CASCADE",
}
LAYERS = Layers(
    "letter",
    {letter: f"megatron_mm.config.layers.{path}" for letter, path in _BUILT_IN.items()},
    kind="LayerKind",
    needs=[each.name for each in fields(LayerKind)],
    dotted=False,
)
