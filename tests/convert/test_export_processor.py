"""The processor of an export takes images as users give them and sees what training saw."""

from __future__ import annotations

import json
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor

from megatron_mm.convert import to_hf
from megatron_mm.data.images import load_image
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from support.exports import converted, exported, save_origin, trained
from support.images import deep_tiff


def test_internvl_reads_a_plain_export_alike(made, tmp_path, monkeypatch):
    """Where no setting is ours alone, transformers' own processor is named and gives the same."""
    # It wants a video processor, which needs torchvision.
    monkeypatch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *a: None)
    made(True, False, False)
    origin = save_origin(tmp_path / "origin", fused=True)
    base = converted(origin, tmp_path / "base", looks=False)
    data = {"max_num_tiles": 5, "image_std": [0.3, 0.2, 0.1]}
    checkpoint = trained(base, tmp_path / "run", origin[0], **data)
    folder = tmp_path / "hf"
    exported(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = InternVLProcessor(
        AutoImageProcessor.from_pretrained(folder),
        tokenizer,
        image_seq_length=json.loads((folder / "processor_config.json").read_text())[
            "image_seq_length"
        ],
        chat_template=tokenizer.chat_template,
    )
    assert (
        type(theirs).__name__
        == json.loads((folder / "processor_config.json").read_text())["processor_class"]
    )
    run = to_hf.open_checkpoint(checkpoint).run
    builder = SampleBuilder(run, load_tokenizer(origin[0]))
    for number, (width, height) in enumerate([(16, 16), (90, 16), (40, 33)]):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        row = {
            "messages": [{"role": "user", "content": "\n<image>what?"}],
            "images": [f"{number}.png"],
        }
        sample = builder.prompt(row, "row", tmp_path)
        text = theirs.apply_chat_template(row["messages"], add_generation_prompt=True)
        found = theirs(
            images=[Image.open(tmp_path / f"{number}.png")], text=text, return_tensors="pt"
        )
        assert found["input_ids"][0].tolist() == sample.tokens_T.tolist()
        ours = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        again = ours(images=Image.open(tmp_path / f"{number}.png"), text=text)
        assert torch.equal(found["pixel_values"], again["pixel_values"])
        model = AutoModelForImageTextToText.from_pretrained(folder)  # no code is needed for it
        assert torch.equal(model(**found).logits, model(**again).logits)


def test_the_processor_takes_images_as_users_give_them(made, tmp_path):
    """One bare image, a path in the message, a file object's image, an array: the same pixels."""
    _, folder, _ = made(True, True, True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    noise = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(noise).save(path)
    chat = [{"role": "user", "content": "<image>what?"}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    expected = processor(images=[Image.open(path)], text=[text])
    assert expected["input_ids"].shape[1] > 10
    for given in (Image.open(path), str(path), path, noise, torch.from_numpy(noise), [[path]]):
        found = processor(images=given, text=text)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), given
    for part in ({"path": str(path)}, {"image": Image.open(path)}, {"image": str(path)}):
        content = [{"type": "image"} | part, {"type": "text", "text": "what?"}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        assert all(torch.equal(found[key], expected[key]) for key in expected), part
    for wrong in ({"truncation": True}, {"videos": [noise]}, {"max_length": 5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            processor(images=[path], text=text, **wrong)
    with pytest.raises(ValueError, match="0 marks <IMG_CONTEXT> but 1 images"):
        processor(images=[path], text="what?")


def test_what_a_viewer_shows_is_read_by_the_processor(made, tmp_path):
    """A turned photo and a transparent drawing, by our loader and by the export's processor."""
    checkpoint, folder, _ = made(True, True, True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    run = to_hf.open_checkpoint(checkpoint).run
    builder = SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(noise).save(tmp_path / "clear.png")
    for name in ("turned.png", "clear.png"):
        row = {"messages": [{"role": "user", "content": "<image>what?"}], "images": [name]}
        sample = builder.prompt(row, "row", tmp_path)
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True)
        for given in (Image.open(tmp_path / name), str(tmp_path / name)):
            found = processor(images=given, text=text)
            assert found["input_ids"][0].tolist() == sample.tokens_T.tolist()
            (image,) = sample.images
            tiles = torch.from_numpy(image.tiles).permute(0, 3, 1, 2) / 255.0
            mean, std = (
                torch.tensor(values).view(3, 1, 1)
                for values in (run.data.image_mean, run.data.image_std)
            )
            assert torch.equal(found["pixel_values"], (tiles - mean) / std)
    assert sample.images[0].grid.rows == 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_a_turned_tiff_by_path_and_opened(made, tmp_path, mode):
    """PIL does not turn what it maps into memory from a path."""
    _, folder, _ = made(True, True, True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, len(mode)), dtype=np.uint8)
    image = Image.fromarray(noise.squeeze(-1) if mode == "L" else noise, mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.tiff"
    image.save(path, exif=exif)
    expected = load_image(path, "row")
    assert expected.size == (16, 48)
    text = processor.apply_chat_template([{"role": "user", "content": "<image>?"}])
    right = processor(images=expected, text=text)
    for given in (path, str(path), Image.open(path), path.read_bytes()):
        found = processor(images=given, text=text)
        assert torch.equal(found["pixel_values"], right["pixel_values"])


def test_base64_keeps_its_transparency(made):
    _, folder, _ = made(True, True, True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    coded = b64encode(buffer.getvalue()).decode()
    text = processor.apply_chat_template([{"role": "user", "content": "<image>?"}])
    right = processor(images=Image.open(buffer), text=text)
    for given in (coded, f"data:image/png;base64,{coded}"):
        found = processor(images=given, text=text)
        assert torch.equal(found["pixel_values"], right["pixel_values"])


def test_the_processor_rejects_what_training_rejects(made, tmp_path):
    _, folder, _ = made(True, True, True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    text = processor.apply_chat_template([{"role": "user", "content": "<image>?"}])
    deep, frames = tmp_path / "deep.png", tmp_path / "frames.gif"
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(deep)
    images = [Image.new("L", (8, 8), value) for value in (0, 99)]
    images[0].save(frames, save_all=True, append_images=images[1:])
    (tmp_path / "deep.tif").write_bytes(deep_tiff(3, 2))
    cases = ((deep, "more than 8 bits"), (tmp_path / "deep.tif", "more than 8 bits"))
    for path, what in (*cases, (frames, "more than 1 frame")):
        for given in (path, Image.open(path)):
            with pytest.raises(ValueError, match=what):
                processor(images=given, text=text)
    for forged in ("<img>", "</img>"):  # after encoding, whatever the text was
        with pytest.raises(ValueError, match=f"text becomes 1 tokens {forged}"):
            processor(text=f"a {forged} b")
    pair = [Image.new("RGB", (16, 16))] * 2
    with pytest.raises(ValueError, match=r"\[1, 1\] images for the prompts' \[2, 0\] marks"):
        processor(images=[[pair[0]], [pair[1]]], text=["<IMG_CONTEXT><IMG_CONTEXT>", "x"])
    processor(images=[pair, []], text=["<IMG_CONTEXT><IMG_CONTEXT>", "x"])
    for content, what in (([{"type": "video"}], "part of the type video"), ("x", "role developer")):
        role = "user" if isinstance(content, list) else "developer"
        with pytest.raises(Exception, match=what):
            processor.apply_chat_template([{"role": role, "content": content}])
