"""Every save has an identity: a file or block of another save, or of another place, is refused."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path

import pytest

from megatron_mm.checkpoint import folders, sealed, sharded, storage
from megatron_mm.checkpoint.blocks import MarkedStream, mark
from megatron_mm.convert.to_hf import open_checkpoint
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import create, refused, tiny_run, train

SECOND, FOURTH = "iter_0000002", "iter_0000004"


def two_saves(run, folder: Path) -> None:
    engine = create(run)
    for iteration in (2, 4):
        train(engine, range(iteration - 2, iteration))
        sharded.save(engine, {}, folder, iteration)


@pytest.fixture(scope="module")
def originals(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    ranks(1, two_saves, tiny_run(), folder / "mine")
    ranks(1, two_saves, tiny_run(seed=7), folder / "other")
    return folder


@pytest.fixture
def saved(originals, tmp_path):
    """The folder of two saves, which a test may spoil."""
    return Path(shutil.copytree(originals / "mine", tmp_path / "mine"))


def places(folder: Path) -> dict:
    """(key, offset) -> place of its block, as torch reads it."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    return {(k.fqn, k.offset): v for k, v in index.storage_data.items()}


def reseal(folder: Path) -> None:
    run = sealed.read_json(folder / "run.json")
    run["checksums"] |= storage.write_format(folder)
    sealed.write_json(folder / "run.json", run)


def test_two_saves_of_a_run_load(ranks, saved):
    assert ranks(1, loaded, saved) == [4]
    runs = [sealed.read_json(saved / name / "run.json") for name in (SECOND, FOURTH)]
    assert len({run["identity"] for run in runs}) == 2


def loaded(folder: Path) -> int:
    return sharded.load(create(tiny_run()), folder)["iteration"]


def test_every_block_and_the_index_carry_it(saved):
    path = saved / FOURTH
    identity = sealed.read_json(path / "run.json")["identity"]
    assert pickle.loads((path / ".metadata").read_bytes()).storage_meta.save_id == identity
    for (key, _), place in places(path).items():
        content = (path / place.relative_path).read_bytes()
        block = content[place.offset : place.offset + place.length]
        words = block[block.rindex(b"megatron_mm ") :].decode()
        assert words.startswith(f"megatron_mm save={identity} key={key} offset=")
    assert str(saved).encode() not in (path / ".metadata").read_bytes()


@pytest.mark.parametrize("where", ["an earlier save", "another run", "another run's iteration 2"])
@pytest.mark.parametrize("file", ["__0_0.distcp", "rng_00000.pt", ".metadata", "run.json"])
def test_a_file_of_another_save(ranks, originals, saved, where, file):
    source = {
        "an earlier save": saved / SECOND,
        "another run": originals / "other" / FOURTH,
        "another run's iteration 2": originals / "other" / SECOND,
    }[where]
    before = (saved / FOURTH / file).read_bytes()
    shutil.copy(source / file, saved / FOURTH / file)
    assert (saved / FOURTH / file).read_bytes() != before
    message = refused(ranks, saved, tiny_run(), size=1)
    named = "rng_00000.pt" if file == "run.json" and where == "another run" else file
    assert named in message or (file == "run.json" and ".metadata" in message)
    if file == "__0_0.distcp":
        assert "a block of another save" in message
        with pytest.raises(CheckpointError, match="a block of another save"):
            export(saved)


def export(folder: Path) -> None:
    """Reads every weight as a conversion does."""
    opened = open_checkpoint(folder)
    for name in opened.parameters:
        opened.reader.read(f"model.{name}")


def test_the_files_of_another_save_for_a_fine_tune(ranks, originals, saved):
    """It reads neither optimizer nor generators."""
    shutil.copy(saved / SECOND / "__0_0.distcp", saved / FOURTH / "__0_0.distcp")
    assert "__0_0.distcp" in refused(ranks, saved, tiny_run(), size=1, finetune=True)
    shutil.copy(originals / "other" / FOURTH / "run.json", saved / FOURTH / "run.json")
    assert ".metadata" in refused(ranks, saved, tiny_run(), size=1, finetune=True)


def test_every_file_of_another_save_under_its_name(ranks, saved):
    shutil.rmtree(saved / FOURTH)
    shutil.copytree(saved / SECOND, saved / FOURTH)
    message = refused(ranks, saved, tiny_run(), size=1)
    assert f"{FOURTH}/run.json is of iteration 2" in message
    (saved / FOURTH).rename(saved / "best")  # a name that says no iteration may be given
    assert ranks(1, loaded, saved / "best") == [2]


def swap(folder: Path, a, b) -> None:
    """Swaps the bytes of two blocks of one length."""
    found = places(folder)
    first, second = found[a], found[b]
    assert first.length == second.length
    path = folder / first.relative_path
    content = bytearray(path.read_bytes())
    one = slice(first.offset, first.offset + first.length)
    two = slice(second.offset, second.offset + second.length)
    content[one], content[two] = content[two], content[one]
    path.write_bytes(content)


def pairs(folder: Path) -> list:
    """Neighbouring blocks of one length: of weights, of moments, and of both."""
    by_length: dict[int, list] = {}
    for where, place in sorted(places(folder).items(), key=str):
        by_length.setdefault(place.length, []).append(where)
    return [pair for same in by_length.values() for pair in zip(same, same[1:], strict=False)]


def test_swapped_blocks(ranks, saved):
    found = pairs(saved / FOURTH)
    assert len(found) > 100
    for number in range(0, len(found), len(found) // 6):
        swap(saved / FOURTH, *found[number])
        message = refused(ranks, saved, tiny_run(), size=1)
        assert "__0_0.distcp has at byte" in message and "a block of another place" in message
        swap(saved / FOURTH, *found[number])
    assert ranks(1, loaded, saved) == [4]


def test_swapped_places_in_a_sealed_index(ranks, saved):
    path = saved / FOURTH
    index = pickle.loads((path / ".metadata").read_bytes())
    data = index.storage_data
    keys = {key.fqn: key for key in data}
    a, b = (keys[f"optimizer.{kind}.final_norm.weight"] for kind in ("exp_avg", "exp_avg_sq"))
    data[a], data[b] = data[b], data[a]
    (path / ".metadata").write_bytes(pickle.dumps(index))
    reseal(path)
    assert "a block of another place" in refused(ranks, saved, tiny_run(), size=1)


def test_one_block_of_an_earlier_save(ranks, saved):
    theirs, mine = places(saved / SECOND), places(saved / FOURTH)
    where = next(where for where in mine if where[0] == "model.final_norm.weight")
    content = bytearray((saved / FOURTH / "__0_0.distcp").read_bytes())
    source = (saved / SECOND / "__0_0.distcp").read_bytes()
    assert mine[where].length == theirs[where].length
    begin, length = mine[where].offset, mine[where].length
    content[begin : begin + length] = source[theirs[where].offset :][:length]
    (saved / FOURTH / "__0_0.distcp").write_bytes(content)
    assert "a block of another save" in refused(ranks, saved, tiny_run(), size=1)


def test_a_block_without_an_identity(ranks, saved):
    """torch writes blocks so. The comment keeps its length, so that offsets stay."""
    path, found = saved / FOURTH / "__0_0.distcp", places(saved / FOURTH)
    place = next(v for (key, _), v in found.items() if key == "model.final_norm.weight")
    content = bytearray(path.read_bytes())
    end = place.offset + place.length
    at = content.rindex(b"megatron_mm save=", place.offset, end)
    content[at:end] = b"x" * (end - at)
    path.write_bytes(content)
    assert "a block without an identity" in refused(ranks, saved, tiny_run(), size=1)


def test_a_rank_s_file_in_the_place_of_another_s(ranks, tmp_path):
    run = tiny_run(dict(pp=2))
    ranks(2, two_saves, run, tmp_path)
    path = tmp_path / FOURTH
    first, second = path / "__0_0.distcp", path / "__1_0.distcp"
    size = max(file.stat().st_size for file in (first, second))
    for file in (first, second):  # so that neither is too short
        with file.open("r+b") as stream:
            stream.truncate(size)
    first.rename(path / "kept")
    second.rename(first)
    (path / "kept").rename(second)
    message = refused(ranks, tmp_path, run)
    assert "_0.distcp" in message


def test_a_save_of_the_same_iteration_has_another(ranks, originals, saved, tmp_path):
    ranks(1, two_saves, tiny_run(), tmp_path / "again")
    shutil.copy(tmp_path / "again" / FOURTH / "__0_0.distcp", saved / FOURTH / "__0_0.distcp")
    assert "a block of another save" in refused(ranks, saved, tiny_run(), size=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("identity", None), ("identity", ""), ("identity", "x" * 32), ("identity", 5)),
        *(("iteration", "4"), ("iteration", -4), ("iteration", True), ("iteration", 2**70)),
        *(("layout", [1]), ("checksums", {"rng_00000.pt": "1"}), ("adam_step", 1.5)),
        *(("scheduler", None), ("loader", []), ("extra", "x"), ("config", {})),
        *(("config", {"model": [], "training": {}}), ("checksums", None), ("layout", {"tp": "1"})),
    ],
)  # fmt: skip
def test_a_forged_run_file(saved, key, value):
    run = sealed.read_json(saved / FOURTH / "run.json")
    sealed.write_json(saved / FOURTH / "run.json", run | {key: value})
    with pytest.raises(CheckpointError, match=f"run.json is damaged: {key}"):
        folders.resolve(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": "x"}, {"num_steps": -1}, {"num_steps": 2**70}, {"max_lr": None},
        {"lr_decay_style": 5}, {"start_wd": [1]}, {"min_lr": "0"},
    ],
)  # fmt: skip
def test_a_forged_schedule(ranks, saved, change):
    run = sealed.read_json(saved / FOURTH / "run.json")
    sealed.write_json(saved / FOURTH / "run.json", run | {"scheduler": run["scheduler"] | change})
    assert f"scheduler.{next(iter(change))}" in refused(ranks, saved, tiny_run(), size=1)


def test_the_mark_is_a_zip_comment_whatever_the_pieces(tmp_path):
    """Written in one piece, in bytes, and in pieces that end inside the archive's end."""
    with zipfile.ZipFile(tmp_path / "plain", "w") as archive:
        archive.writestr("values", bytes(1000))
    content = (tmp_path / "plain").read_bytes()
    for step in (1, 5, 21, 22, 23, 100, len(content)):
        with (tmp_path / "marked").open("wb") as raw:
            stream = MarkedStream(raw, mark("0" * 32, "model.x", (3, 0)))
            for begin in range(0, len(content), step):
                stream.write(content[begin : begin + step])
            stream.finish()
        with zipfile.ZipFile(tmp_path / "marked") as archive:
            assert archive.comment == b"megatron_mm save=" + b"0" * 32 + b" key=model.x offset=3,0"
            assert archive.read("values") == bytes(1000)
