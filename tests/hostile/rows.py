"""Rows of every form, and what a run does with them; for the readers of JSONL and parquet."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from megatron_mm.config.settings import RunConfig
from megatron_mm.config.settings_model import FusionConfig, ModelConfig
from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import LOOK, LOOK_CONTEXT, load_tokenizer, train_sentencepiece
from megatron_mm.errors import DataError
from tests.hostile.mutate import mutated_tree

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>How many?"},
            {"role": "assistant", "content": "3", "reasoning_content": "1, 2", "weight": 1},
        ],
        "images": ["a.png"],
        "skill": "count",
        "ground_truth": "3",
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "4", "loss": True},
        ],
        "images": ["a.png"],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "response": "4",
        "data_source": "sums",
        "reward_model": {"ground_truth": "4", "style": "rule"},
        "extra_info": {"index": 3},
    },
    {
        "messages": [
            {"role": "user", "content": "<image>How many?"},
            {"role": "assistant", "content": "3 <look>4<look>"},
        ],
        "images": ["a.png"],
        "looks": [{"image": 0, "box": [0.0, 0.25, 0.5, 1.0]}, None],
    },
    {
        "messages": [
            {"role": "user", "content": "<image><image>How many?"},
            {"role": "assistant", "content": "4"},
        ],
        "images": [
            {"path": "a.png", "box": [0.0, 0.25, 0.5, 1.0]},
            {"path": "a.png", "box": None},
        ],
    },
]


def changed(rng: Random) -> Any:
    """A row with some of its values replaced."""
    return mutated_tree(rng, rng.choice(ROWS))


def add_image(folder: Path) -> None:
    """Writes the image that the rows name."""
    Image.new("RGB", (16, 8)).save(folder / "a.png")


@cache
def builder() -> SampleBuilder:
    """What turns rows into samples: small tiles, glimpses, and a tokenizer of a few words."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-tokenizer-"))
    texts = ["How many? 3 4 Be brief. user assistant"] * 20
    train_sentencepiece(texts, folder / "a.model", 400, [LOOK, LOOK_CONTEXT])
    pattern, memory = "GE Q *E V", FusionConfig(vision_memory="pyramid")
    run = RunConfig(model=ModelConfig(hybrid_layer_pattern=pattern, fusion=memory))
    run.model.language.vocab_size = 1024
    vision: Any = run.model.vision
    vision.image_size, vision.patch_size = 8, 2
    run.data.max_num_tiles, run.data.seq_length = 4, 512
    return SampleBuilder(run, load_tokenizer(folder / "a.model"))


def use(path: Path) -> None:
    """Opens a file and builds each row in the ways that training, packing and evaluation do. Raises
    the first DataError, after all rows were tried."""
    files, made, first = open_row_files(path, RowGroupCache()), builder(), None
    for number in range(min(len(files), 50)):
        rows, index = files.locate(number)
        for turn in (made.measure, made.prompt, made.training):
            try:
                turn(rows[index], rows.where(index), rows.folder)
            except DataError as error:
                assert str(error).startswith(f"{path}:"), f"no row is named: {error}"
                first = first or error
    if first is not None:
        raise first
