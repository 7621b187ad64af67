"""Shared parts of families that read and write transformers configs. Imports no torch.

A table has a row for each setting: transformers' key, our field, and the default of the
transformers class, because a saved config.json may leave out what equals it. The default is not
always what was published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.pattern import parse_pattern
from megatron_mm.config.settings_model import LanguageConfig, ModelConfig
from megatron_mm.config.tree import from_dict
from megatron_mm.errors import ConfigError

Table = Sequence[tuple[str, str, Any]]
MIXER_NAMES = {"G": "linear_attention", "*": "full_attention"}
FFN = "E"  # of every layer that no other kind claims


def written(settings: Any, table: Table, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The table's keys with the settings' values, and what is fixed."""
    values = {key: getattr(settings, name) for key, name, _ in table} | dict(fixed)
    return {key: list(v) if isinstance(v, (list, tuple)) else v for key, v in values.items()}


def renamed(config: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """Our field -> value, or the default where the config lacks the key."""
    return {name: config.get(key, default) for key, name, default in table}


def demand(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a key with another value than ours; an absent key is fine."""
    for key, value in fixed.items():
        found = config.get(key, value)
        if (found or value) and found != value:  # None and [] both mean "no such layers"
            raise ConfigError(f"{where}{key} is {found!r}; allowed: {value!r}")


@dataclass(frozen=True)
class TextWords:
    """A hybrid language model in the words of its transformers config.

    Attributes:
        model_type: transformers' name of it.
        settings: our dataclass.
        table: keys of the config.
        rope: likewise, keys of its `rope_parameters`.
        layers: number of layers of the transformers class.
        fixed: what our layers do and no setting changes: written out, and demanded on the way in.
        rope_fixed: likewise, of `rope_parameters`.
        demanded: keys that released files have and the transformers class has not: never written.
    """

    model_type: str
    settings: type[LanguageConfig]
    table: Table
    rope: Table
    layers: int
    fixed: Mapping[str, Any]
    rope_fixed: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    demanded: Mapping[str, Any] = field(default_factory=dict)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Keywords of the transformers config class; looks and injections are left out."""
        language, layers = model.language, parse_pattern(model.hybrid_layer_pattern)
        kinds = [MIXER_NAMES[layer.kind] for layer in layers if layer.kind in MIXER_NAMES]
        own: dict[str, Any] = {}
        for kind in LAYERS.used(model.hybrid_layer_pattern):
            if kind.hf_config is not None:
                own |= kind.hf_config(model)
            elif kind.numbered and kind.letter not in (*MIXER_NAMES, FFN):
                raise ConfigError(
                    f"letter {kind.letter} ({kind.title}) has no words in transformers' "
                    f"{self.model_type} config; allowed: a kind with `hf_config`"
                )
        return {
            "model_type": self.model_type,
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
            "tie_word_embeddings": not language.untie_embeddings_and_output_weights,
            "rope_parameters": written(language, self.rope, self.rope_fixed),
            **written(language, self.table, self.fixed),
            **own,
        }

    def read(self, config: Mapping[str, Any], where: str, tied: bool) -> ModelConfig:
        """The text-only model of a config at the dotted place `where`."""
        claimed = {key for _, kind in LAYERS.items() for key in kind.hf_keys}
        fixed = {**self.fixed, **self.demanded}
        demand(config, {k: v for k, v in fixed.items() if k not in claimed}, where)
        values = renamed(config, self.table)
        values["untie_embeddings_and_output_weights"] = not tied
        # Older files keep the numbers beside an empty rope_scaling; where both are given,
        # transformers takes it.
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        known = {key for key, _, _ in self.rope}
        fixed = {**self.rope_fixed, "type": "default"}
        for key, value in rope.items():
            if key not in known and (key not in fixed or value != fixed[key]):
                allowed = ", ".join(f"{k} {v!r}" for k, v in self.rope_fixed.items())
                raise ConfigError(f"{where}rope {key} is {value!r}; allowed: {allowed}")
        for key, name, default in self.rope:
            values[name] = rope.get(key, config.get(key, default))
        language = from_dict(self.settings, values, where.rstrip(".") or "config")
        pattern = read_pattern(config, where, self.layers)
        own: dict[str, Any] = {
            kind.letter: from_dict(kind.settings, kind.hf_settings(config), where)
            for kind in LAYERS.used(pattern)
            if kind.settings is not None and kind.hf_settings is not None
        }
        return ModelConfig(pattern, language, vision=None, layers=own)


def read_pattern(config: Mapping[str, Any], where: str, layers: int) -> str:
    """The layer pattern of a config: a mixer by its `layer_types`, then experts, or the kind that
    claims the layer.

    Args:
        layers: their number in a config that does not say it.
    """
    count, types = config.get("num_hidden_layers", layers), config.get("layer_types")
    if types is None:
        every = config.get("full_attention_interval", 4)
        types = [MIXER_NAMES["G" if (i + 1) % every else "*"] for i in range(count)]
    if len(types) != count:
        raise ConfigError(f"{where}num_hidden_layers is {count}; allowed: {len(types)} layer_types")
    letters = {name: letter for letter, name in MIXER_NAMES.items()}
    for kind in types:
        if kind not in letters:
            raise ConfigError(f"{where}layer_types has {kind!r}; allowed: {', '.join(letters)}")
    claims = [(kind, kind.hf_claims) for _, kind in LAYERS.items() if kind.hf_claims is not None]
    pattern = ""
    for layer, name in enumerate(types):
        mine = {kind.role: kind.letter for kind, claimed in claims if claimed(config, layer)}
        pattern += mine.get("mixer", letters[name]) + mine.get("ffn", FFN)
    return pattern
