"""Loads a Hugging Face folder as a transformers model, for comparison."""

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
    """Loads the folder's model in fp32, with eager attention and experts.

    Raises:
        ConvertError: the folder carries code that may not run.
    """
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
    """Whether the folder is a vision family's original release, which transformers cannot load."""
    config = read_json(folder / CONFIG)
    return any(family.released(config) is not config for _, family in VISION_FAMILIES.items())


@torch.no_grad()
def released_in_transformers(source: HFFolder, mapping: StateMapping):
    """Loads a release into transformers' model by way of the table of names.

    A comparison then checks two computations on the same tensors. It cannot show an error in the
    table's release names, which would affect both sides. The folder's own code, which could, is
    never run.

    Raises:
        ConvertError: the image token is unknown, or a tensor is missing.
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
    # "stacked" spells the names inside transformers' model.
    spelled = write_links(source.model, blueprint(source.model), "stacked")
    into = {link.mcore: link for link in spelled}
    for link in mapping.links:
        mcore = link.to_mcore(source.read, 0, link.shape[0] if link.counted else 0)
        for name, tensor in into[link.mcore].to_hf(mcore, 0):
            missing.pop(name).copy_(tensor)
    if missing:
        raise ConvertError(f"{source.folder} has nothing for transformers' {next(iter(missing))}")
    return hf
