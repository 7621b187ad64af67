"""transformers' own models without memory, in a process of its own: name -> shape on stdout.

    python tests/convert/meta_names.py < config.json

Nothing of ours is imported: what it says is transformers' word alone.
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


def main() -> None:
    words = json.load(sys.stdin)
    fused = words.pop("model_type") == "internvl"
    config = InternVLConfig(**words) if fused else Qwen3NextConfig(**words)
    kind = InternVLForConditionalGeneration if fused else Qwen3NextForCausalLM
    with torch.device("meta"):
        model = kind._from_config(config)
    inside = model.state_dict()
    assert all(tensor.is_meta for tensor in inside.values())
    saved = revert_weight_conversion(model, dict(inside))
    shapes = ({n: list(t.shape) for n, t in found.items()} for found in (inside, saved))
    json.dump(list(shapes), sys.stdout)


if __name__ == "__main__":
    main()
