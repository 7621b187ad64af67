"""Files by which an exported folder reads text and images as training did: chat template,
processor, generation config.

A folder that was converted and never trained keeps the files it came with, as far as they serve
its model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mm.config import ModelConfig, RunConfig, read_memories
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.convert.folder import IMAGE_CONTEXT
from megatron_mm.data.tiles import ImageSettings, image_settings
from megatron_mm.data.tokenizer import GENERATION_CONFIG, Tokenizer, load_tokenizer
from megatron_mm.errors import DataError

REMOTE = Path(__file__).parent / "remote"
TEMPLATE, PROCESSOR = "chat_template.jinja", "processor_config.json"
IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
CODE = "processing_megatron_mm.py"
OURS = "MegatronMMProcessor"
AUTO_PROCESSOR = f"{CODE.removesuffix('.py')}.{OURS}"  # its entry in an auto_map
TILES, LOOKS = "tiles", "looks"  # keys of our processor's settings
# What InternVLProcessor asks its tokenizer for.
NAMED_TOKENS = ("start_image_token", "end_image_token", "context_image_token", "video_token")


def has_clvr(model: ModelConfig) -> bool:
    """Whether the model computes looks or glimpses: the pattern has one and there is a memory."""
    return bool(read_memories(model))


def has_code(model: ModelConfig) -> bool:
    """Whether an export needs code of its own: transformers knows neither looks nor a second
    hop."""
    return has_clvr(model) or "C" in model.hybrid_layer_pattern


def input_files(checkpoint: Any, assets: Sequence[Path], lines: list[str]) -> dict[str, bytes]:
    """Returns name -> content of the tokenizer's files, the template, the processor and the
    generation config of an export.

    Args:
        checkpoint: a `to_hf.Checkpoint`.
        assets: files that travel with the weights; all lie in one folder.
        lines: notes for the user, to which what is missing is added.
    """
    model, run = checkpoint.model, checkpoint.run
    files = {path.name: path.read_bytes() for path in assets}
    tokenizer = tokenizer_of(assets, run, lines)
    kept = is_untouched(checkpoint)
    if not (kept and _template_serves(files, model)):
        files = _without_templates(files) | {TEMPLATE: (REMOTE / TEMPLATE).read_bytes()}
    processors = [name for name in files if name.endswith("processor_config.json")]
    foreign = processors and TILES not in json.loads(files.get(PROCESSOR, b"{}"))
    if model.vision is not None and not (kept and foreign):
        others = {name: content for name, content in files.items() if name not in processors}
        files = others | _processor_files(run, files)
    if tokenizer is not None and not (kept and GENERATION_CONFIG in files):
        ends = [*tokenizer.end_ids, *_ends_of_training(run, tokenizer, lines)]
        files[GENERATION_CONFIG] = _generation_config(
            list(dict.fromkeys(ends)), tokenizer.pad_id, files.get(GENERATION_CONFIG)
        )
    return files


def is_untouched(checkpoint: Any) -> bool:
    """Whether nothing but the origin's own files has said how the model reads: it was converted,
    not trained here, and has no looks, glimpses or second hop."""
    return checkpoint.iteration == 0 and not has_code(checkpoint.model)


def _ends_of_training(run: RunConfig, travelling: Tokenizer, lines: list[str]) -> tuple[int, ...]:
    """Returns the end tokens of the tokenizer that training read, if it is not the one that travels
    along."""
    path = run.data.tokenizer_model
    if not path or Path(path).resolve() == Path(travelling.path).resolve():
        return ()
    try:
        return load_tokenizer(path, run.data.end_tokens).end_ids
    except DataError:
        lines.append(
            f"end tokens are those of {travelling.path}: the tokenizer of the run, {path}, cannot "
            "be read"
        )
        return ()


def tokenizer_of(assets: Sequence[Path], run: RunConfig, lines: list[str]) -> Tokenizer | None:
    """Returns the tokenizer among the files that travel along; None without one, which `lines`
    then say."""
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in assets):
        lines.append("no tokenizer travelled along: name its folder with --assets")
        return None
    folder = assets[0].parent
    try:
        return load_tokenizer(folder, run.data.end_tokens)
    except DataError as error:
        lines.append(
            f"end tokens and processor are not checked: {error}; name a folder with --assets"
        )
        return None


def _generation_config(ends: list[int], pad_id: int, origin: bytes | None) -> bytes:
    config = {} if origin is None else json.loads(origin)
    return as_json(config | {"eos_token_id": ends, "pad_token_id": pad_id})


def _without_templates(files: dict[str, bytes]) -> dict[str, bytes]:
    kept = {n: content for n, content in files.items() if not n.startswith("chat_template")}
    name = "tokenizer_config.json"
    if name in kept and "chat_template" in (config := json.loads(kept[name])):
        del config["chat_template"]
        kept[name] = as_json(config)
    return kept


def _template_serves(files: dict[str, bytes], model: ModelConfig) -> bool:
    """Whether the template that came along can write the model's prompts. A model without vision
    may have none. Any other needs one that writes an image as one image token, which processors
    multiply, and nothing else of it."""
    template = _template_in(files)
    if model.vision is None or template is None:
        return model.vision is None
    from transformers.utils.chat_template_utils import render_jinja_template

    def written(*parts: dict[str, str]) -> str:
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]
        return render_jinja_template([chat], chat_template=template)[0][0]

    try:
        image, none = written({"type": "image"}), written()
    except Exception:  # it cannot read such a message, whatever the reason
        return False
    # A list that is printed as it is names its parts' types.
    return image.count(IMAGE_CONTEXT) == none.count(IMAGE_CONTEXT) + 1 and "type" not in image


def _template_in(files: dict[str, bytes]) -> str | None:
    if TEMPLATE in files:
        return files[TEMPLATE].decode()
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = json.loads(files[name]).get("chat_template") if name in files else None
        if isinstance(found, str):
            return found
    return None


def _processor_files(run: RunConfig, files: dict[str, bytes]) -> dict[str, bytes]:
    settings = image_settings(run)
    assert settings is not None  # the model has a vision encoder
    config: dict[str, Any] = {
        "processor_class": OURS,
        "auto_map": {"AutoProcessor": AUTO_PROCESSOR},
        TILES: asdict(settings) | {"tokens_per_tile": settings.tokens_per_tile},
    }
    asking = query_settings(run.model)
    if asking is not None:
        config[LOOKS] = {"slots": asking.slots, "most": asking.max_queries}
    made = {CODE: (REMOTE / CODE).read_bytes()}
    if _as_internvl(settings, files):
        # transformers' own class then reads images alike, for those who run no code of a folder.
        config["processor_class"] = "InternVLProcessor"
        config["image_seq_length"] = settings.tokens_per_tile
        made[IMAGES] = as_json(_internvl_images(settings))
        made |= {VIDEOS: files[VIDEOS]} if VIDEOS in files else {}
    return made | {PROCESSOR: as_json(config)}


def _as_internvl(settings: ImageSettings, files: dict[str, bytes]) -> bool:
    """Whether transformers' InternVLProcessor can make what training saw."""
    standard = settings.image_stream == "all" and not settings.memories
    standard &= settings.use_thumbnail and settings.max_image_tokens is None
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    named = config.get("extra_special_tokens") or {}
    return standard and all(name in config or name in named for name in NAMED_TOKENS)


def _internvl_images(settings: ImageSettings) -> dict[str, Any]:
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "max_patches": settings.max_num_tiles,
        "min_patches": 1,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": settings.image_size, "width": settings.image_size},
    }


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
