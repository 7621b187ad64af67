"""The declaration of Qwen3-Next (https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct)."""

from __future__ import annotations

from megatron_mm.config.families import LanguageFamily
from megatron_mm.model.families.qwen3_next.hf_config import WORDS
from megatron_mm.model.families.qwen3_next.presets import PRESETS
from megatron_mm.model.families.qwen3_next.settings import Qwen3NextSettings

FAMILY = LanguageFamily(
    title="Qwen3-Next",
    settings=Qwen3NextSettings,
    presets=PRESETS,
    rows="megatron_mm.model.families.qwen3_next.names.ROWS",
    carried=("mtp.", "language_model.mtp."),  # multi-token prediction
    hf_type=WORDS.model_type,
    hf_classes=("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    to_hf=WORDS.write,
    from_hf=WORDS.read,
)
