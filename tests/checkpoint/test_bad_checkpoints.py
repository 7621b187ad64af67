"""A checkpoint that does not fit or is damaged: one clear line on every rank, nothing changed."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoint import sealed, storage
from support.checkpoint_runs import refused, tiny_run, train_and_save

NAME = "iter_0000001"


@pytest.fixture(scope="module")
def original(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    ranks(2, train_and_save, tiny_run(dict(pp=2)), folder, 1)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def edit_index(folder: Path, change) -> None:
    path = folder / NAME / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index.state_dict_metadata)
    path.write_bytes(pickle.dumps(index))
    run = sealed.read_json(folder / NAME / "run.json")  # seal it again, as an attacker would
    run["checksums"] |= storage.write_format(folder / NAME)
    sealed.write_json(folder / NAME / "run.json", run)


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp"])
def test_a_missing_shard_file(ranks, folder, file):
    (folder / NAME / file).unlink()
    message = refused(ranks, folder)
    assert f"of 2 shard files {file} is missing" in message


def test_a_truncated_shard_file(ranks, folder):
    path = folder / NAME / "__1_0.distcp"
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size // 2)
    assert f"__1_0.distcp has {size // 2} of {size} bytes" in refused(ranks, folder)


@pytest.mark.parametrize("tensor", ["model.output_layer.weight", "optimizer.exp_avg.final_norm"])
@pytest.mark.parametrize("part", ["header", "values"])
def test_a_damaged_shard_file(ranks, folder, tensor, part):
    """One wrong byte in one tensor; the second stage holds both tensors."""
    index = pickle.loads((folder / NAME / ".metadata").read_bytes())
    info = next(v for k, v in index.storage_data.items() if k.fqn.startswith(tensor))
    path = folder / NAME / info.relative_path
    content = bytearray(path.read_bytes())
    content[info.offset + (0 if part == "header" else info.length // 2)] ^= 0xFF
    path.write_bytes(content)
    message = refused(ranks, folder)
    assert f"{info.relative_path} is damaged in the chunk at byte {info.offset}" in message
    assert "rank 1, 1 of 2 ranks failed" in message


@pytest.mark.parametrize("file", [".metadata", "metadata.json", "run.json"])
def test_a_half_written_folder(ranks, folder, file):
    (folder / NAME / file).unlink()
    message = refused(ranks, folder / NAME)
    assert "not a complete checkpoint" in message
    assert file in message


def test_the_rest_of_an_unfinished_save(ranks, folder):
    rest = (folder / NAME).rename(folder / f"{NAME}.partial")
    assert "never finished" in refused(ranks, rest)
    assert f"latest names {NAME}, which is not there" in refused(ranks, folder)


def test_no_folder_at_all_and_an_empty_one(ranks, tmp_path):
    assert "no such folder" in refused(ranks, tmp_path / "none")
    assert "neither latest nor run.json" in refused(ranks, tmp_path)


def test_a_damaged_run_file(ranks, folder):
    (folder / NAME / "run.json").write_text('{"format": 1,')
    assert "run.json is damaged" in refused(ranks, folder)
    (folder / NAME / "run.json").write_text('{"format": 1}')
    assert "run.json has no checksum" in refused(ranks, folder)
    sealed.write_json(folder / NAME / "run.json", {"format": 1})
    assert "run.json has format 1; this version: 3" in refused(ranks, folder)


def test_a_missing_generator_file(ranks, folder):
    (folder / NAME / "rng_00001.pt").unlink()
    message = refused(ranks, folder)
    assert "rng_00001.pt" in message
    assert "rank 1, 1 of 2 ranks failed" in message


def test_another_model_is_named_by_its_first_difference(ranks, folder):
    run = tiny_run(dict(pp=2))
    run.model.language.num_experts = 4
    message = refused(ranks, folder, run)
    assert "another model: language.num_experts is 6 there and 4 here" in message
    looks = tiny_run(dict(pp=2), pattern="GE *E")
    assert "hybrid_layer_pattern is 'GE L *E J' there and 'GE *E' here" in refused(
        ranks, folder, looks
    )


def test_missing_misshapen_and_foreign_tensors_are_counted(ranks, folder):
    def change(entries):
        del entries["model.final_norm.weight"], entries["model.output_layer.weight"]
        entries["model.embedding.weight"].size = torch.Size((96, 60))
        entries["model.stranger"] = entries["optimizer.exp_avg.final_norm.weight"]

    edit_index(folder, change)
    message = refused(ranks, folder)
    assert "2 tensors are missing (first model.final_norm.weight)" in message
    assert (
        "1 have another shape (first model.embedding.weight: [96, 60] there, [96, 64] here)"
        in message
    )
    assert "1 are unexpected (first model.stranger)" in message


def test_optimizer_state_of_other_trainable_modules(ranks, folder):
    message = refused(ranks, folder, tiny_run(dict(pp=2), freeze_vision=True))
    assert "unexpected (first optimizer.exp_avg.vision." in message
    assert "same trainable modules" in message


def test_another_precision(ranks, folder):
    message = refused(ranks, folder, tiny_run(dict(pp=2), bf16=True))
    assert "training.bf16 is False there and True here" in message


class Touch:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_index_that_would_run_code(ranks, folder, tmp_path):
    edit_index(folder, lambda entries: entries.update(evil=Touch(tmp_path / "ran")))
    assert "which no index needs" in refused(ranks, folder)
    assert not (tmp_path / "ran").exists()


def test_finetune_allows_no_more_than_it_says(ranks, folder):
    run = tiny_run(dict(pp=2))
    run.model.language.rotary_base = 5.0
    assert "language.rotary_base is 10000.0" in refused(ranks, folder, run, finetune=True)
    edit_index(folder, lambda entries: entries.pop("model.final_norm.weight"))
    assert "1 tensors are missing" in refused(ranks, folder, finetune=True)
