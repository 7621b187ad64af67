"""Several sequences of a prompt, beams and casts: the looks of each see its own prompt's tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from support.exports import converted, exported, save_origin, trained
from support.folders import one_rank_job

SIZES = [(64, 16), (16, 16), (33, 40)]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The model and the processor of an export with looks at the tiles."""
    root = tmp_path_factory.mktemp("generate")
    with one_rank_job():
        base = converted(save_origin(root / "origin", fused=True), root / "base", looks=True)
        checkpoint = trained(base, root / "run", root / "origin" / "language", max_num_tiles=4)
        exported(checkpoint, root / "hf")
    load = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(root / "hf", **load).eval()
    generator = torch.Generator().manual_seed(3)
    for look in model.clvr.looks.values():  # new ones add nothing
        torch.nn.init.normal_(look.linear_proj.weight, std=0.3, generator=generator)
    return model, AutoProcessor.from_pretrained(root / "hf", **load)


def prompts(processor, *counts: int):
    """A batch of prompts with so many images each."""
    numbers, chats = iter(range(99)), []
    for count in counts:
        pictures = []
        for number in (next(numbers) for _ in range(count)):
            width, height = SIZES[number % len(SIZES)]
            shape = (height, width, 3)
            noise = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
            pictures.append({"type": "image", "image": Image.fromarray(noise)})
        chats.append([{"role": "user", "content": [*pictures, {"type": "text", "text": "what?"}]}])
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return processor.apply_chat_template(chats, **how)


def continued(model, inputs, **how) -> torch.Tensor:
    found = model.generate(**inputs, max_new_tokens=6, **how)
    return found[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("counts", [(1,), (2, 1), (0, 2, 1)])
def test_every_sequence_is_the_greedy_one_where_one_token_is_allowed(export, counts):
    model, processor = export
    inputs = prompts(processor, *counts)
    greedy = continued(model, inputs, do_sample=False)
    # What is seen changes what is said next, so that wrong tiles would show.
    blind = dict(inputs) | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with torch.no_grad():
        seen, unseen = (model(**given, logits_to_keep=1).logits for given in (inputs, blind))
    assert ((seen - unseen).norm() / seen.norm()) > 1e-2
    found = continued(model, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert found.tolist() == greedy.repeat_interleave(3, 0).tolist()


def test_beams_of_a_batch_are_those_of_its_prompts(export):
    """A beam may take another's place within its prompt, whose images are the same."""
    model, processor = export
    inputs = prompts(processor, 2, 1)
    how = {"do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    cached = continued(model, inputs, **how)
    assert len({tuple(row) for row in cached.tolist()}) > 3
    for use_cache in (True, False):
        found = continued(model, inputs, use_cache=use_cache, **how)
        assert found.tolist() == cached.tolist()


def test_a_model_on_several_devices_is_one_line(export, monkeypatch):
    model, processor = export
    monkeypatch.setattr(model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    with pytest.raises(ValueError, match=r"lies on 2 devices \(0, 1\), .*device_map=0"):
        model(**prompts(processor, 1))
    monkeypatch.setattr(model, "hf_device_map", {"": "cpu"})
    model(**prompts(processor, 1))


def test_coordinates_keep_their_precision(export):
    """The usual `inputs.to(device, dtype)` casts pixels."""
    _, processor = export
    inputs = prompts(processor, 1)
    expected = inputs["memory_coordinates"].clone()
    cast = inputs.to("cpu", torch.bfloat16)
    assert cast["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(cast["memory_coordinates"], expected)
