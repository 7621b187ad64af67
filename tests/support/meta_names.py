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
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion


def names(words: dict) -> list[dict[str, list[int]]]:
    """Returns the shapes by name, first inside the model, then as it is saved."""
    fused = words.pop("model_type") == "internvl"
    config = InternVLConfig(**words) if fused else Qwen3NextConfig(**words)
    kind = InternVLForConditionalGeneration if fused else Qwen3NextForCausalLM
    with torch.device("meta"):
        model = kind._from_config(config)
    inside = model.state_dict()
    assert all(tensor.is_meta for tensor in inside.values())
    saved = revert_weight_conversion(model, dict(inside))
    return [{n: list(t.shape) for n, t in found.items()} for found in (inside, saved)]


if __name__ == "__main__":
    json.dump([names(words) for words in json.load(sys.stdin)], sys.stdout)
