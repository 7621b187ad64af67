"""A folder as a model of transformers, to compare ours with."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_mm.config import to_transformers_dict
from megatron_mm.config.families import VISION_FAMILIES, vision_family
from megatron_mm.config.hf import in_transformers_words
from megatron_mm.convert.folder import CONFIG, HFFolder, read_json
from megatron_mm.convert.mapping import StateMapping, write_links
from megatron_mm.errors import ConvertError
from megatron_mm.model.blueprint import blueprint


def load_transformers(folder: Path, trust_remote_code: bool):
    """The folder's model in fp32, with plain attention and experts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_json(folder / CONFIG)
    fused = "vision_config" in in_transformers_words(config)
    if "auto_map" in config and not trust_remote_code:
        raise ConvertError(
            f"{folder} carries code: --trust-remote-code runs it, --tensors-only does without"
        )
    kind = AutoModelForImageTextToText if fused else AutoModelForCausalLM
    return kind.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    ).eval()


def is_release(folder: Path) -> bool:
    """Whether the names are those of a vision family's own release, which transformers cannot
    load."""
    config = read_json(folder / CONFIG)
    return any(family.released(config) is not config for _, family in VISION_FAMILIES.items())


@torch.no_grad()
def released_in_transformers(source: HFFolder, plan: StateMapping):
    """A release's tensors in transformers' model, brought there by the table of names.

    What is compared then is two computations with the same tensors. That the table reads the
    release's names rightly cannot show: both sides would be wrong alike. No code of the folder
    is run, which is also why there is no third side to ask.
    """
    import transformers

    if source.image_token_id is None:
        raise ConvertError(
            f"{source.folder} does not say which token is <IMG_CONTEXT>: give config.json "
            "img_context_token_id, or use --tensors-only"
        )
    words = to_transformers_dict(source.model, source.image_token_id)
    words.pop("model_type")
    config_class, model_class = vision_family(source.model).hf_classes
    hf = (
        getattr(transformers, model_class)
        ._from_config(
            getattr(transformers, config_class)(**words),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        .eval()
    )
    missing = dict(hf.named_parameters())
    spelled = write_links(source.model, blueprint(source.model), "stacked")  # as inside the model
    into = {link.mcore: link for link in spelled}
    for link in plan.links:
        ours = link.to_mcore(source.read, 0, link.shape[0] if link.counted else 0)
        for name, tensor in into[link.mcore].to_hf(ours, 0):
            missing.pop(name).copy_(tensor)
    if missing:
        raise ConvertError(f"{source.folder} has nothing for transformers' {next(iter(missing))}")
    return hf
