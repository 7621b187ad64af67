"""The declaration of Qwen3.5-MoE's text model (https://huggingface.co/Qwen/Qwen3.5-35B-A3B).

Its layers compute what Qwen3-Next's do: the projections of a gated DeltaNet are separate tensors
in files only, and a rotary embedding in three sections equals one in a single section where a
position has one number. Its own vision tower, which gives positions three, is not built here.
"""

from __future__ import annotations

from megatron_mm.config.families import LanguageFamily
from megatron_mm.config.settings import ParallelConfig
from megatron_mm.errors import ConfigError
from megatron_mm.model.families.qwen3_5_moe.hf_config import WORDS, released
from megatron_mm.model.families.qwen3_5_moe.presets import PRESETS
from megatron_mm.model.families.qwen3_5_moe.settings import Qwen35MoeSettings


def check(language: Qwen35MoeSettings, parallel: ParallelConfig) -> None:
    """Raises ConfigError unless three sections share the rotary features."""
    sections = language.mrope_section
    pairs = int(language.kv_channels * language.rotary_percent) // 2
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != pairs:
        raise ConfigError(
            f"mrope_section is {sections}; allowed: 3 numbers that sum to {pairs}, half of the "
            f"rotary features (kv_channels {language.kv_channels} * rotary_percent "
            f"{language.rotary_percent:g})"
        )


FAMILY = LanguageFamily(
    title="Qwen3.5-MoE",
    settings=Qwen35MoeSettings,
    presets=PRESETS,
    rows="megatron_mm.model.families.qwen3_5_moe.names.ROWS",
    # multi-token prediction, and the vision tower of published folders
    carried=("mtp.", "language_model.mtp.", "model.visual."),
    hf_type=WORDS.model_type,
    hf_classes=("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    to_hf=WORDS.write,
    from_hf=WORDS.read,
    released=released,
    check=check,
)
