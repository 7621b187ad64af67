"""Compares how an exported folder reads text and images with how training read them: end tokens,
dtype, and the token ids and pixel values of conversations, bitwise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_mm.config import RunConfig, memories
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.convert import export_inputs
from megatron_mm.convert.export import config_dtype
from megatron_mm.convert.folder import CONFIG, HFFolder, read_json, travelling
from megatron_mm.convert.parity import clvr_inputs
from megatron_mm.convert.to_hf import Checkpoint
from megatron_mm.data.collate import collate
from megatron_mm.data.images import normalise
from megatron_mm.data.messages import ESCAPED_MARK, IMAGE_MARK, check_messages
from megatron_mm.data.place_names import PLACE_TOKENS
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tiles import choose_grids, image_settings, tiles_seen
from megatron_mm.data.tokenizer import LOOK
from megatron_mm.errors import ConvertError, DataError

ROOMY = 10**9  # tokens: no case is too long
TEMPLATES = "additional_chat_templates"  # a folder of which transformers offers the templates


def compare_inputs(source: HFFolder, checkpoint: Checkpoint, trust_remote_code: bool) -> list[str]:
    """Compares a folder with what an export of the checkpoint has and with what training sees.

    Returns:
        Lines that say what agrees, and what could not be compared.

    Raises:
        ConvertError: names the first difference.
        DataError: the run cannot read with this tokenizer.
    """
    folder, run = source.folder, checkpoint.run
    untouched = export_inputs.is_untouched(checkpoint)
    files = {path.name: path.read_bytes() for path in travelling(folder)}
    kept = {p.name: p.read_bytes() for p in checkpoint.assets} if untouched else None
    ours = (folder / export_inputs.CODE).is_file()
    _check_dtype(source, needed=files != kept)
    if files == kept and not ours:
        return ["template, processor and end tokens are those that it was converted with"]
    assets = checkpoint.assets or travelling(folder)
    notes: list[str] = []
    expected = export_inputs.input_files(checkpoint, assets, notes)
    for name in sorted(expected.keys() | files):
        if kept is None or files.get(name) != kept.get(name):
            _check_same(folder, name, expected.get(name))
    if (folder / TEMPLATES).exists():
        raise ConvertError(f"{folder / TEMPLATES}: further templates; training has one")
    tokenizer = export_inputs.tokenizer_of(assets, run, [])
    if tokenizer is None:
        return [f"its inputs were not compared: {note}" for note in notes]
    if not checkpoint.assets:
        notes.append(
            "tokenizer and end tokens are those of the folder itself: the checkpoint's, "
            f"{run.data.tokenizer_model or 'which it does not name'}, is not here"
        )
    template = (export_inputs.REMOTE / export_inputs.TEMPLATE).read_bytes()
    if expected.get(export_inputs.TEMPLATE) != template or (
        checkpoint.model.vision is not None and export_inputs.CODE not in expected
    ):
        return [*notes, "template and processor are those it came with; training has its own"]
    processor = _processor(folder, checkpoint, trust_remote_code)
    builder = SampleBuilder(replace(run, data=replace(run.data, seq_length=ROOMY)), tokenizer)
    count = 0
    for chat in conversations(run):
        try:
            _compare(processor, run, builder, chat, folder)
        except (ConvertError, DataError, MemoryError):
            raise
        except Exception as error:  # of transformers or the folder's code, of any kind
            reason = " ".join(str(error).split())[:300]
            raise ConvertError(
                f"{folder}: {chat.name}: {type(error).__name__}: {reason}"
            ) from error
        count += 1
    return [*notes, f"token ids and pixel values are bitwise identical, {count} conversations"]


def _check_dtype(source: HFFolder, needed: bool) -> None:
    config = read_json(source.folder / CONFIG)
    said = config.get("dtype", config.get("torch_dtype"))
    elements: Counter[torch.dtype] = Counter()
    for tensor in source.tensors.values():
        elements[tensor.dtype] += torch.Size(tensor.shape).numel()
    held = config_dtype(elements)
    if said != held and (needed or said is not None):
        raise ConvertError(
            f"{source.folder / CONFIG}: dtype is {said!r}, most elements are {held}; transformers "
            f"would load all of them as {said}"
        )


def _check_same(folder: Path, name: str, expected: bytes | None) -> None:
    """Checks one of the folder's files against what an export has, JSON by its values."""
    path = folder / name
    found = path.read_bytes() if path.is_file() else None
    if found == expected:
        return
    if found is None or expected is None:
        what = "is missing" if found is None else "is in the folder and in no export"
        raise ConvertError(f"{path} {what}: text and images may be read otherwise")
    if not name.endswith(".json"):
        raise ConvertError(f"{path} is not that of an export of the checkpoint")
    theirs, ours = json.loads(found), json.loads(expected)
    differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    if differing:
        key = differing[0]
        raise ConvertError(
            f"{path}: {key} is {_short(theirs.get(key))}, of an export {_short(ours.get(key))}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _processor(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Loads the folder's processor, of a text-only model its tokenizer. The folder's code is run
    only if it is ours, or trusted."""
    from transformers import AutoProcessor, AutoTokenizer

    if checkpoint.model.vision is None:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    code = folder / export_inputs.CODE
    if code.is_file() and code.read_bytes() == (export_inputs.REMOTE / code.name).read_bytes():
        from megatron_mm.convert.remote.processing_megatron_mm import MegatronMMProcessor

        return MegatronMMProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if not trust_remote_code:
        raise ConvertError(f"{code} is not the processor of an export; --trust-remote-code runs it")
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


@dataclass(frozen=True)
class Chat:
    """A conversation to compare, and its images."""

    name: str
    messages: list[dict[str, Any]]
    images: tuple[Image.Image, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


def conversations(run: RunConfig) -> Iterator[Chat]:
    """Yields conversations that touch each part of the template, and for a model with vision
    images of many sizes: some are cut into as many tiles as are allowed, some have to share
    `max_image_tokens`."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "\u00e9"}}}
    yield Chat("text", [_user("What is 2 + 2?")])
    yield Chat("line breaks", [_said("system", "\nBe brief.\n"), _user("\n\n  1\n\nwhy?\n")])
    yield Chat("spaces", [_user("   three,  two "), _said("assistant", " \n yes "), _user(" ")])
    yield Chat("an answer behind spaces", [_user("a"), _said("assistant", "  yes"), _user("b")])
    yield Chat("an escaped mark", [_user(f"what does {ESCAPED_MARK} mean?")])
    thought = _said("assistant", "\n5") | {"reasoning_content": "\n2 and 3\n"}
    yield Chat("reasoning", [_user("2 + 3?"), thought, _user("sure?")])
    text = {"type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    used = [_user("add"), _said("assistant", "") | {"tool_calls": [call, text]}]
    used += [_said("tool", "3"), _said("tool", "\n4"), _said("assistant", "done"), _user("so?")]
    yield Chat("tools", [_said("system", "Use tools."), *used], tools=(tool, tool))
    yield Chat("tools alone", used, tools=(tool,))
    settings = image_settings(run)
    if settings is None:
        return
    side, most = settings.image_size, settings.max_num_tiles
    sizes = [(side, side), (side // 2 + 1, 2 * side), (most * side, side), (side, most * side)]
    sizes += [((most + 1) * side, side), (3 * side - 1, 2 * side + 1)]
    pictures = [_picture(*size, seed) for seed, size in enumerate(sizes)]
    for picture in pictures:
        name = "an image of {}x{} pixels".format(*picture.size)
        yield Chat(name, [_user(f"{IMAGE_MARK}\nwhat is it?")], (picture,))
    widest = pictures[2]
    (grid,) = choose_grids([widest.size], replace(settings, max_image_tokens=None), "a row")
    cost = settings.tokens_per_tile * tiles_seen(grid, settings)
    count = 2 if settings.max_image_tokens is None else settings.max_image_tokens // cost + 1
    try:
        choose_grids([widest.size] * count, settings, "a row")
    except DataError:  # not even one tile each
        return
    asked = [_user(f"{IMAGE_MARK}and" * count + ": same?"), _said("assistant", "no")]
    yield Chat(f"{count} images", [*asked, _user("why?")], (widest,) * count)
    asking = query_settings(run.model)
    if asking is None:
        return
    parts = ["one is", " 3", ""][: asking.max_queries]
    one = LOOK if asking.query_place != "tokens" else "".join((*PLACE_TOKENS[::34], LOOK))
    looked = [_said("assistant", one + one.join(parts)), _user("sure?")]
    again = looked if asking.max_queries >= 2 * len(parts) else []
    for shown in sorted({1, min(count, 2)}):
        seen = [_user("hi"), _said("assistant", "yes"), _user(IMAGE_MARK * shown + "which?")]
        yield Chat(f"looks at {shown} images", [*seen, *looked, *again], (widest,) * shown)


def _compare(
    processor: Any, run: RunConfig, builder: SampleBuilder, chat: Chat, folder: Path
) -> None:
    row = {"messages": chat.messages, "images": [_png(i) for i in chat.images]}
    row |= {"tools": list(chat.tools)} if chat.tools else {}
    # Another row's images, as a control may show them to looks, come with their row.
    row |= {m.images: row["images"] for m in memories(run.model, run.data.memory_images)}
    sample, parts = builder.prompt(row, chat.name, folder), _in_parts(chat)
    how = {"tools": list(chat.tools) or None, "add_generation_prompt": True}
    found = processor.apply_chat_template(
        parts, tokenize=True, return_dict=True, return_tensors="pt", **how
    )
    # Marks in text write what parts write.
    spelled = (chat.messages, parts)
    texts = [processor.apply_chat_template(m, tokenize=False, **how) for m in spelled]
    if texts[0] != texts[1]:
        raise ConvertError(f"{folder}: {chat.name}: its template reads texts and parts differently")
    theirs, mine = found["input_ids"][0].tolist(), sample.tokens_T.tolist()
    if theirs != mine:
        pairs = zip_longest(theirs, mine)
        place, (one, other) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ConvertError(
            f"{folder}: {chat.name}: token {place} of {len(theirs)} is {one}, of {len(mine)} in "
            f"training {other}; its template, tokenizer or tiling is not that of training"
        )
    if not chat.images:
        return
    batch = collate([sample], settings=builder.settings, pad_id=builder.tokenizer.pad_id)
    pixels = normalise(batch.pixels_NCHW, run.data.image_mean, run.data.image_std)
    expected = {"pixel_values": pixels}
    expected |= clvr_inputs(batch) if export_inputs.has_clvr(run.model) else {}
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor):
            raise ConvertError(
                f"{folder}: {chat.name}: {name} {list(found[name].shape)} is not training's "
                f"{list(tensor.shape)}; compare {export_inputs.PROCESSOR} with the run's settings"
            )


def _in_parts(chat: Chat) -> list[dict[str, Any]]:
    """The messages as lists of parts, which hold the images."""
    images, found = iter(chat.images), []
    checked = check_messages({"messages": chat.messages}, chat.name)
    for message, read in zip(chat.messages, checked, strict=True):
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(read.texts):
            parts += [{"type": "image", "image": next(images)}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        found.append(message | {"content": parts})
    return found


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _user(content: str) -> dict[str, Any]:
    return _said("user", content)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
