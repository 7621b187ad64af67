"""A header of safetensors, an index or a tokenizer's file that is damaged or forged: one line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_mm.convert.folder import read_json, tokenizer_id
from megatron_mm.convert.hf_files import INDEX, SINGLE, read_header, stored_tensors
from megatron_mm.errors import ConvertError

SECONDS = 20  # for what takes less than one here


def write(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + raw + data)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def refused(path: Path) -> str:
    begin = time.perf_counter()
    with pytest.raises(ConvertError) as caught:
        found = read_header(path)
        [tensor.read() for tensor in found.values()]
    message = str(caught.value)
    assert path.name in message and message.isprintable() and len(message) < 800
    assert time.perf_counter() - begin < SECONDS
    return message


def test_a_good_header(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(5)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    found = read_header(tmp_path / SINGLE)
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in tensors.items())


HUGE = 2**70
ENTRIES = {
    "2^70 in shape and offsets": entry(shape=(HUGE,), offsets=(0, 4 * HUGE)),
    "2^70 beside 0": entry(shape=(HUGE, 0), offsets=(0, 0)),
    "0 beside 2^70": entry(shape=(0, HUGE), offsets=(0, 0)),
    "2^62 twice beside 0": entry(shape=(2**59, 2**59, 0), offsets=(0, 0)),
    "an offset of 2^70": entry(offsets=(HUGE, HUGE + 24)),
    "offsets below 0": entry(offsets=(-24, 0)),
    "a size below 0": entry(shape=(-2, -3)),
    "offsets the wrong way": entry(offsets=(24, 0)),
    "three offsets": entry(offsets=(0, 24, 24)),
    "one offset": entry(offsets=(0,)),
    "offsets of floats": entry(offsets=(0.0, 24.0)),
    "offsets of bools": entry(offsets=(False, 24)),
    "offsets of texts": entry(offsets=("0", "24")),
    "a text that would be multiplied": entry(shape=("x", 10**12)),
    "a list that would be multiplied": entry(shape=([0], 10**12)),
    "a shape that is a text": entry() | {"shape": "23"},
    "a shape that is a number": entry() | {"shape": 6},
    "a shape that is none": entry() | {"shape": None},
    "10^5 dimensions": entry(shape=[1] * 10**5, offsets=(0, 4)),
    "NaN": entry(shape=(float("nan"),)),
    "1e400": entry(shape=(float("inf"),)),
    "no dtype": {"shape": [2, 3], "data_offsets": [0, 24]},
    "a dtype that is a list": entry(dtype=["F32"]),
    "a dtype of another world": entry(dtype="Q4_K"),
    "a long dtype": entry(dtype="F" * 10**6),
    "a dtype with escapes": entry(dtype="\x1b[31m"),
    "an entry that is a list": [1],
    "an entry that is none": None,
    "too few bytes": entry(offsets=(0, 20)),
    "too many bytes": entry(offsets=(0, 28)),
    "a gap before": entry(offsets=(4, 28)),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_an_entry_that_is_no_tensor(tmp_path, what):
    refused(write(tmp_path / "x.safetensors", {"a": ENTRIES[what]}, bytes(24)))


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b]0;x\x07", "\ud800", "a" * 10**6])
def test_a_name_that_is_none(tmp_path, name):
    refused(write(tmp_path / "x.safetensors", {name: entry()}, bytes(24)))


HEADERS = {
    "empty": b"",
    "no object": b"[1, 2]",
    "a text": b'"x"',
    "deep": b'{"a":' * 10**5,
    "deep lists": b"[" * 10**6,
    "not UTF-8": b'{"\xff": 1}',
    "5000 digits": b'{"a": {"dtype": "F32", "shape": ['
    + b"9" * 5000
    + b'], "data_offsets": [0,1]}}',
    "twice": b'{"a": {}, "a": {}}',
    "cut": b'{"a": {"dtype": "F32", ',
    "zeros": bytes(100),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_is_no_json(tmp_path, what):
    refused(write(tmp_path / "x.safetensors", HEADERS[what], bytes(24)))


def test_two_equal_names_behind_many_others(tmp_path):
    """Looking for them by counting each name in all would take hours."""
    names = ", ".join(f'"{n}": 0' for n in range(10**5))
    refused(write(tmp_path / "x.safetensors", f'{{{names}, "last": 0, "last": 0}}'.encode()))


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 100 * 2**20 + 1, 10**6])
def test_a_length_that_is_wrong(tmp_path, length):
    refused(write(tmp_path / "x.safetensors", {"a": entry()}, bytes(24), length))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 20])
def test_a_file_that_is_cut(tmp_path, count):
    path = write(tmp_path / "x.safetensors", {"a": entry()}, bytes(24))
    path.write_bytes(path.read_bytes()[:count])
    refused(path)


INDICES = {
    "no map": {},
    "a list": [],
    "a map that is a list": {"weight_map": ["a"]},
    "a number": {"weight_map": {"a": 5}},
    "a list of names": {"weight_map": {"a": ["x.safetensors"]}},
    "a path": {"weight_map": {"a": "../x.safetensors"}},
    "a whole path": {"weight_map": {"a": "/etc/x.safetensors"}},
    "NUL": {"weight_map": {"a": "x\0.safetensors"}},
    "half a letter": {"weight_map": {"a": "\ud800.safetensors"}},
    "escapes": {"weight_map": {"a": "\x1b[31m.safetensors"}},
    "a long name": {"weight_map": {"a": "x" * 10**5 + ".safetensors"}},
    "another tensor": {"weight_map": {"b\x1b": "x.safetensors", "a": "x.safetensors"}},
    "no file": {"weight_map": {"a": "y.safetensors"}},
    "no weights": {"weight_map": {"a": "config.json"}},
}


@pytest.mark.parametrize("what", INDICES)
def test_an_index_that_is_none(tmp_path, what):
    write(tmp_path / "x.safetensors", {"a": entry()}, bytes(24))
    (tmp_path / INDEX).write_text(json.dumps(INDICES[what]))
    with pytest.raises(ConvertError) as caught:
        stored_tensors(tmp_path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 800
    message.encode()  # can be shown


def test_files_that_are_too_large_to_be_what_they_say(tmp_path):
    for name in (INDEX, "config.json"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(2**40)  # no byte of it is on the disk
    with pytest.raises(ConvertError, match=INDEX):
        stored_tensors(tmp_path)
    with pytest.raises(ConvertError, match="config.json"):
        read_json(tmp_path / "config.json")


TOKENIZERS = {
    "tokens that are a number": ("tokenizer.json", {"added_tokens": 5}),
    "a token that is a text": ("tokenizer.json", {"added_tokens": ["<IMG_CONTEXT>"]}),
    "an id that is a text": (
        "tokenizer.json",
        {"added_tokens": [{"content": "<IMG_CONTEXT>", "id": "x"}]},
    ),
    "an id that is a list": ("added_tokens.json", {"<IMG_CONTEXT>": [1]}),
    "a decoder that is a list": ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    "a decoder of texts": ("tokenizer_config.json", {"added_tokens_decoder": {"5": "x"}}),
    "a list": ("tokenizer.json", [1]),
    "an id of 1e400": ("added_tokens.json", {"<IMG_CONTEXT>": float("inf")}),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_tokenizer_that_lists_no_tokens(tmp_path, what):
    name, content = TOKENIZERS[what]
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ConvertError, match=name):
        tokenizer_id(tmp_path, "<IMG_CONTEXT>")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConvertError, match="config.json"):
        read_json(tmp_path / "config.json")
