"""A fault of a folder is one line that names it, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_mm.config import ParallelConfig
from megatron_mm.convert import to_hf
from megatron_mm.convert.folder import open_folder
from megatron_mm.convert.hf_files import stored_tensors
from megatron_mm.errors import CheckpointError, ConvertError
from megatron_mm.parallel import groups
from support.folders import (
    assert_same,
    base_model,
    planned,
    read_all,
    save_fused,
    save_text,
    to_checkpoint,
    to_folder,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_fused(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A fresh copy that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "hf"))


@pytest.fixture
def job():
    groups.start(ParallelConfig())
    yield
    dist.destroy_process_group()


def change(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, edit) -> None:
    """One file of what `edit` makes of all tensors."""
    tensors = edit(read_all(folder))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def index_of(folder: Path) -> tuple[Path, dict]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


NORM = "language_model.model.norm.weight"
EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"


def add(name: str, like: str = NORM):
    return lambda tensors: tensors | {name: tensors[like].clone()}


def without(name: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def replaced(name: str, make):
    return lambda tensors: tensors | {name: make(tensors[name])}


TENSORS = {
    "nobody maps it": (add("language_model.model.extra.weight"), "unexpected.*model.extra.weight"),
    "an expert too many": (
        add("language_model.model.layers.1.mlp.experts.6.up_proj.weight", EXPERT),
        "unexpected.*experts.6.up_proj",
    ),
    "an expert too few": (without(EXPERT), f"missing.*{EXPERT}"),
    "a missing norm": (without(NORM), f"missing.*{NORM}"),
    "no projector": (
        lambda t: {n: x for n, x in t.items() if not n.startswith("multi_modal_projector")},
        "6 tensors are missing.*multi_modal_projector.layer_norm.weight",
    ),
    "a wrong shape": (
        replaced(NORM, lambda t: t[:-1].clone()),
        rf"another shape.*{NORM}: \[63\] there, \[64\] here",
    ),
    "a transposed weight of the same size": (
        replaced(EXPERT, lambda t: t.t().contiguous()),
        r"another shape.*\[64, 28\] there, \[28, 64\] here",
    ),
    "quantised": (replaced(NORM, lambda t: t.to(torch.int8)), f"{NORM} is torch.int8"),
    "two precisions in one of ours": (
        replaced(EXPERT, lambda t: t.to(torch.bfloat16)),
        "is torch.float32 but .*experts.3.up_proj.weight is torch.bfloat16",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(folder, tmp_path, job, name):
    edit, words = TENSORS[name]
    rewrite(folder, edit)
    refused(folder, tmp_path / "out", words)


def refused(folder: Path, out: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        to_checkpoint(folder, out)
    assert "\n" not in str(caught.value) and not out.exists()


def test_tied_that_are_not_tied(folder, tmp_path, job):
    """InternVLConfig's default is true: a config that leaves the flag out says tied."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    refused(folder, tmp_path / "out", "lm_head.weight differs from .*embed_tokens.weight")


def test_tied_and_written_twice(folder, tmp_path, job):
    """The same tensor under both names is fine."""
    rewrite(
        folder,
        lambda t: (
            t
            | {
                "language_model.lm_head.weight": t[
                    "language_model.model.embed_tokens.weight"
                ].clone()
            }
        ),
    )
    change(folder, tie_word_embeddings=True)
    source, plan, _ = planned(folder)
    assert source.tied and not plan.tied


def test_image_token(folder, tmp_path, job):
    token = {"id": 94, "content": "<IMG_CONTEXT>", "special": True}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    refused(folder, tmp_path / "out", "image_token_id is 95, but <IMG_CONTEXT> is 94")
    (folder / "tokenizer.json").unlink()
    change(folder, image_token_id=96)
    refused(folder, tmp_path / "out", "image_token_id is 96; allowed: 0 to 95")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/megatron_mm_was_executed",)


def test_pickles_are_never_opened(folder, tmp_path, job):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, tmp_path / "out", "pytorch_model.bin is pickled and could run code")
    assert not Path("/tmp/megatron_mm_was_executed").exists()


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", 3])
def test_an_index_that_leads_elsewhere(folder, tmp_path, job, shard):
    path, index = index_of(folder)
    index["weight_map"][NORM] = shard
    path.write_text(json.dumps(index))
    refused(folder, tmp_path / "out", "model.safetensors.index.json")


def test_an_index_that_disagrees(folder, tmp_path, job):
    path, index = index_of(folder)
    files = sorted(set(index["weight_map"].values()))
    right = index["weight_map"][NORM]
    index["weight_map"][NORM] = next(f for f in files if f != right)
    path.write_text(json.dumps(index))
    refused(folder, tmp_path / "out", f"holds {NORM}, which .* places in")
    index["weight_map"] |= {NORM: right, "ghost": files[0]}
    path.write_text(json.dumps(index))
    refused(folder, tmp_path / "out", "does not hold ghost")
    (folder / files[0]).unlink()
    refused(folder, tmp_path / "out", f"{files[0]} is missing")


def test_a_file_beside_an_index_of_others(folder, tmp_path, job):
    """transformers reads the file, and leaves an index behind that it does not write again."""
    tensors = read_all(folder)
    save_file(tensors, folder / "model.safetensors")
    words = r"holds model.safetensors, and model.safetensors.index.json of \d+ other files"
    refused(folder, tmp_path / "out", words)
    path, index = index_of(folder)
    for shard in set(index["weight_map"].values()):
        (folder / shard).unlink()
    index["weight_map"] = dict.fromkeys(tensors, "model.safetensors")
    path.write_text(json.dumps(index))  # one that agrees
    assert {*stored_tensors(folder)} == {*tensors}


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_a_shard_longer_or_shorter_than_its_header_says(folder, tmp_path, job):
    path = first_shard(folder)
    content = path.read_bytes()
    path.write_bytes(content + b"payload")
    size = len(content)
    refused(folder, tmp_path / "out", f"has {size + 7} bytes, its header describes {size}")
    path.write_bytes(content[:-1])
    refused(folder, tmp_path / "out", f"has {size - 1} bytes, its header describes {size}")


def header(entries: dict | str, data: int) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(begin: int, end: int, shape=(4,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "no header": b"abc",
    "a header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "not JSON": header("{", 0),
    "a list": header("[]", 0),
    "a negative size": header({"a": entry(0, 16, (-4,))}, 16),
    "a size that is no number": header({"a": entry(0, 16, ("4",))}, 16),
    "a shape of other bytes": header({"a": entry(0, 16, (5,))}, 16),
    "overlapping": header({"a": entry(0, 16), "b": entry(8, 24)}, 24),
    "a hole": header({"a": entry(0, 16), "b": entry(20, 36)}, 36),
    "an unknown dtype": header({"a": entry(0, 16, dtype="Q9")}, 16),
    "a name given twice": header(
        '{"a": ' + json.dumps(entry(0, 16)) + ', "a": ' + json.dumps(entry(16, 32)) + "}", 32
    ),
    "deeply nested": header("[" * 100_000, 0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(folder, tmp_path, job, name):
    path = first_shard(folder)
    path.write_bytes(HEADERS[name])
    refused(folder, tmp_path / "out", path.name)


def test_configs(folder, tmp_path, job):
    path = folder / "config.json"
    change(folder, model_type="llava", text_config={"model_type": "llama"})
    refused(folder, tmp_path / "out", "config.json: .*llama|model_type is 'llava'")
    path.write_text("{")
    refused(folder, tmp_path / "out", "config.json is not JSON")
    path.unlink()
    refused(folder, tmp_path / "out", "config.json: No such file")
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere/config.json")


@pytest.mark.parametrize("where", [(), ("text_config",)])
def test_quantised_folders(folder, tmp_path, job, where):
    """Also from the config alone, and before unexpected names of scales are listed."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config
    for key in where:
        part = part[key]
    part["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(config))
    words = r"config.json has a quantization_config \('fp8'\): quantised weights are not taken"
    refused(folder, tmp_path / "out", words)
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder, weights=False)


def test_nothing_is_overwritten(folder, tmp_path, job):
    to_checkpoint(folder, tmp_path / "mega")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "mega").rglob("*"))
    with pytest.raises(CheckpointError, match="holds checkpoints already"):
        to_checkpoint(folder, tmp_path / "mega")
    to_folder(tmp_path / "mega", tmp_path / "out")
    with pytest.raises(CheckpointError, match="out exists: nothing is overwritten"):
        to_folder(tmp_path / "mega", tmp_path / "out")
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "mega").rglob("*"))
    assert_same(read_all(tmp_path / "out"), read_all(folder))


def test_a_disk_that_is_too_small(folder, tmp_path, job, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    to_checkpoint(folder, tmp_path / "mega")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        for go in (
            lambda: to_checkpoint(folder, tmp_path / "full"),
            lambda: to_folder(tmp_path / "mega", tmp_path / "out"),
        ):
            with pytest.raises(CheckpointError, match="has 1000 bytes of disk left"):
                go()
    assert not (tmp_path / "full" / "latest").exists() and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(folder, tmp_path, job, monkeypatch):
    """Half way through, which the thread that writes is told: one line, and nothing is left
    that could be taken for a result."""
    to_checkpoint(folder, tmp_path / "mega")
    written, room = os.pwrite, [0]

    def write(handle, content, at):
        room[0] -= len(content)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return written(handle, content, at)

    monkeypatch.setattr(os, "pwrite", write)
    size = sum(tensor.nbytes for tensor in read_all(folder).values())
    for part in (0.0, 0.5, 0.99):
        room[0] = int(part * size)
        with pytest.raises(CheckpointError, match=r"full: OSError: .*No space left on device"):
            to_checkpoint(folder, tmp_path / "full")
        assert list((tmp_path / "full").iterdir()) == []
        room[0] = int(part * size)
        with pytest.raises(CheckpointError, match=r"out: OSError: .*No space left on device"):
            to_folder(tmp_path / "mega", tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "hf", "mega"]


def test_a_checkpoint_whose_index_runs_code(folder, tmp_path, job):
    """Even one with the right checksum."""
    from megatron_mm.checkpoint import sealed, storage

    to_checkpoint(folder, tmp_path / "mega")
    path = tmp_path / "mega/iter_0000000"
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    run = sealed.read_json(path / "run.json")
    sealed.write_json(path / "run.json", run | {"checksums": storage.write_format(path)})
    with pytest.raises(CheckpointError, match="mkdir, which no index needs"):
        to_folder(tmp_path / "mega", tmp_path / "out")
    assert not Path("/tmp/megatron_mm_was_executed").exists()


def test_a_damaged_block_is_found(folder, tmp_path, job):
    to_checkpoint(folder, tmp_path / "mega")
    path = tmp_path / "mega/iter_0000000/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="__0_0.distcp is damaged in the chunk at byte"):
        to_folder(tmp_path / "mega", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_folders_that_do_not_go_together(folder, tmp_path):
    save_text(tmp_path / "text", mtp=False)
    with pytest.raises(ConvertError, match="fused model already"):
        planned(folder, tmp_path / "text")
    with pytest.raises(ConvertError, match="takes a ViT alone"):
        planned(tmp_path / "text", folder)


def test_export_needs_the_image_token(folder, tmp_path, job):
    to_checkpoint(folder, tmp_path / "mega")
    opened = to_hf.open_checkpoint(tmp_path / "mega")
    opened.notes.clear()
    with pytest.raises(CheckpointError, match="which token is <IMG_CONTEXT>.*--assets"):
        to_hf.convert(opened, tmp_path / "out", dist.group.WORLD, quiet=True)
    assert not (tmp_path / "out").exists() and base_model().vision
