"""Folders of Hugging Face tokenizers, and SentencePiece models."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random

from megatron_mm.data.chat import encode_row
from megatron_mm.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mm.errors import DataError
from support.hf_tokenizers import byte_level_tokenizer
from tests.hostile.mutate import json_bytes, mutated_bytes, mutated_tree

NAME = "tokenizers"
ALLOWED = (DataError,)
ROW = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "3 é"}]}
CODE = "import pathlib\npathlib.Path('/tmp/fuzz-ran').touch()\nclass Own: pass\n"
MORE = {
    "generation_config.json": {"eos_token_id": [1, 2]},
    "config.json": {"model_type": "qwen2", "eos_token_id": 1},
    "special_tokens_map.json": {"eos_token": "<|im_end|>"},
}


@cache
def sound() -> dict[str, bytes]:
    """The files of a sound folder, and of a sound model."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-tokenizer-"))
    byte_level_tokenizer(["How many 3? assistant"] * 9, 300).save_pretrained(folder)
    train_sentencepiece(["How many 3? assistant user"] * 20, folder / "a.model", 400)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {name: json.dumps(tree).encode() for name, tree in MORE.items()}


sound()


def make(rng: Random, folder: Path) -> Path:
    """Writes a folder with one or two files changed, or a model with damage."""
    files = dict(sound())
    model = files.pop("a.model")
    if rng.random() < 0.2:
        (folder / "a.model").write_bytes(mutated_bytes(rng, model))
        return folder / "a.model"
    for name in (*MORE,):
        if rng.random() < 0.6:
            files.pop(name, None)
    for name in rng.sample(sorted(files), rng.choice((1, 1, 2))):
        if name.endswith(".json"):
            tree = json.loads(files[name])
            if rng.random() < 0.1 and isinstance(tree, dict):
                tree["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
            files[name] = json_bytes(rng, mutated_tree(rng, tree))
        else:
            files[name] = mutated_bytes(rng, files[name])
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "own.py").write_text(CODE)
    return folder


def read(value: Path) -> None:
    """Loads the tokenizer, writes a conversation and reads it."""
    made = load_tokenizer(value)
    assert made.decode(encode_row(ROW, "rows:1", made, [], 10_000).tokens) is not None
    assert not Path("/tmp/fuzz-ran").exists(), "the folder's code was run"
