"""Names and shapes of transformers' own models, which it builds on the meta device.

    python tests/support/meta_names.py < configs.json

It imports nothing of this package, so that its answer is transformers' alone.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

CLASSES = {
    "internvl": (InternVLConfig, InternVLForConditionalGeneration),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}


def names(words: dict) -> list[dict[str, list[int]]]:
    """Returns the shapes by name, first inside the model, then as it is saved."""
    config_class, kind = CLASSES[words.pop("model_type")]
    with torch.device("meta"):
        model = kind._from_config(config_class(**words))
    inside = model.state_dict()
    assert all(tensor.is_meta for tensor in inside.values())
    saved = revert_weight_conversion(model, dict(inside))
    return [{n: list(t.shape) for n, t in found.items()} for found in (inside, saved)]


if __name__ == "__main__":
    json.dump([names(words) for words in json.load(sys.stdin)], sys.stdout)
