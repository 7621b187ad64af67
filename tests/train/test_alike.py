"""Ranks that disagree do not start: what they compare, and how the first difference is named."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mm.checkpoint import sealed
from megatron_mm.checkpoint.folders import FORMAT, KINDS, LATEST, RUN, name_of
from megatron_mm.config import RunConfig
from megatron_mm.config.tree import leaves, value_at
from megatron_mm.errors import ConfigError
from megatron_mm.train import alike
from support.trainers import digits_run

# What rank 1 of a job has instead, and how the error begins.
SETTINGS = {
    "lr": 0.5,
    "seed": 77,
    "clip_grad": 0.25,
    "weight_decay": 0.5,
    "max_num_tiles": 3,
    "moe_aux_loss_coeff": 0.125,
    "tensor_model_parallel_size": 2,
    "global_batch_size": 8,
    "bf16": True,
    "save": "elsewhere",
    "loss_spike_factor": 4.0,
    "distributed_timeout_minutes": 3,
    "extra_columns": ["another"],
    "hybrid_layer_pattern": "GE GE",
    "reward_timeout": 3.0,
}


def test_every_file_that_an_objective_names_is_compared():
    """A stale file on one node would train its ranks towards something else."""
    names = re.compile(r"(_load|_map|_routes)$")
    run, expected = RunConfig(), set()
    for leaf in leaves(RunConfig):
        if leaf.path[0] in run.objectives and names.search(leaf.name):
            many = leaf.name == "teacher_load"
            value = [f"a={leaf.name}", f"b={leaf.name}2"] if many else leaf.name
            setattr(run.objectives[leaf.path[0]], leaf.name, value)
            expected |= {leaf.name, f"{leaf.name}2"} if many else {leaf.name}
    assert len(expected) == 7
    assert expected <= {*alike.files_of(run)}


def test_a_teachers_folder_may_contain_an_equals_sign():
    run = RunConfig()
    run.objectives["rl"].teacher_load = ["runs/lr=1e-4/checkpoint"]
    assert "runs/lr=1e-4/checkpoint" in alike.files_of(run)


def paths() -> dict[str, tuple[str, ...]]:
    return {leaf.name: leaf.path for leaf in leaves(RunConfig)}


def set_on(run: RunConfig, name: str, value: object) -> None:
    setattr(value_at(run, paths()[name][:-1]), name, value)


def error_of(run: RunConfig) -> str:
    try:
        alike.check_alike(run)
    except ConfigError as error:
        return str(error)
    return "alike"


def on_rank_settings(scenes: Path) -> dict[str, str]:
    """Returns what each setting's difference comes to; with nothing different, under ''."""
    found = {"": error_of(digits_run(scenes))}
    for name, value in SETTINGS.items():
        run = digits_run(scenes)
        if dist.get_rank() == 1:
            set_on(run, name, value)
        found[name] = error_of(run)
    run = digits_run(scenes)
    run.data.num_workers = run.logging.log_interval = 1 + dist.get_rank()
    run.logging.output_dir = f"out{dist.get_rank()}"
    return found | {"may differ": error_of(run)}


def test_a_setting_that_differs_is_named_on_every_rank(ranks, scenes):
    first, second = ranks(2, on_rank_settings, scenes)
    assert first == second
    assert first.pop("") == first.pop("may differ") == "alike"
    for name, text in first.items():
        key = ".".join(paths()[name])
        assert text.startswith(f"setting {key} differs: rank 1 on "), (name, text)
        assert "\n" not in text and "rank 0 on " in text


def on_rank_files(scenes: Path, folder: Path) -> dict[str, str]:
    """Each rank has a folder of its own, reached by one relative path, as nodes with disks do."""
    mine = folder / str(dist.get_rank())
    os.chdir(mine)
    run = digits_run(scenes)
    run.data.train_data[0].path, run.data.valid_data = "rows.jsonl", "valid.jsonl"
    run.data.tokenizer_model = "tokenizer.model"
    found = {"same": error_of(run)}

    def with_change(name: str, file: str, change) -> None:
        kept = (mine / file).read_bytes()
        about = (mine / file).stat()
        if dist.get_rank() == 1:
            change(mine / file)
        found[name] = error_of(run)
        (mine / file).write_bytes(kept)
        os.utime(mine / file, ns=(about.st_atime_ns, about.st_mtime_ns))

    def flip_last(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(bytes(data))

    def flip_unseen(path: Path) -> None:
        """In none of the blocks that are sampled: only the time tells."""
        data = bytearray(path.read_bytes())
        data[alike.BLOCK + 10] ^= 1
        path.write_bytes(bytes(data))

    with_change("longer", "rows.jsonl", lambda path: path.write_bytes(path.read_bytes() + b"\n"))
    with_change("another end", "rows.jsonl", flip_last)
    with_change("unseen", "rows.jsonl", flip_unseen)
    with_change("absent", "valid.jsonl", Path.unlink)
    with_change("tokenizer", "tokenizer.model", flip_last)
    with_change("touched", "rows.jsonl", lambda path: os.utime(path, (1, 1)))
    os.chdir(folder)
    return found


def test_files_that_differ_are_named_and_copies_are_not(ranks, scenes, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        rows = "".join(f'{{"number": {n}}}\n' for n in range(60_000))  # 1 MB
        (tmp_path / rank / "rows.jsonl").write_text(rows)
        for name in ("valid.jsonl", "tokenizer.model"):
            shutil.copy(scenes / name, tmp_path / rank / name)
        for path in (tmp_path / rank).iterdir():
            os.utime(path, (1e9, 1e9))
    here = os.getcwd()
    first, second = ranks(2, on_rank_files, scenes, tmp_path)
    assert os.getcwd() == here and first == second
    assert first.pop("same") == first.pop("touched") == "alike"
    files = {"absent": "valid.jsonl", "tokenizer": "tokenizer.model"}
    for name, text in first.items():
        assert text.startswith(f"file {files.get(name, 'rows.jsonl')} differs: rank 1 on "), text
    assert "has none (No such file or directory)" in first["absent"]
    assert "has 1,068,891 bytes" in first["longer"], first["longer"]


def test_of_a_folder_of_checkpoints_only_the_one_that_is_read_is_compared(tmp_path):
    held = {key: kind() for key, kind in KINDS.items()} | {"identity": "0" * 32, "format": FORMAT}
    held["config"] = {"model": {}, "training": {}}
    for iteration in (1, 2, 3):
        (tmp_path / name_of(iteration)).mkdir()
        sealed.write_json(tmp_path / name_of(iteration) / RUN, held | {"iteration": iteration})
    (tmp_path / LATEST).write_text(f"{name_of(2)}\n")
    expected = [tmp_path / LATEST, tmp_path / name_of(2) / RUN]
    assert [*alike.sampled(str(tmp_path))] == [f"file {path}" for path in expected]
    # Whoever reads a damaged one says what is wrong.
    (tmp_path / LATEST).write_text("nonsense\n")
    assert len(alike.sampled(str(tmp_path))) == 4


def test_what_computes_is_compared():
    """A node that lacks a package chooses other kernels than its peers, or fails alone."""
    run = RunConfig()
    assert "convolve_and_scan" in alike.kernels_of(run)
    run.backend.gdn_kernel = "fla"
    assert alike.kernels_of(run).startswith("gdn_kernel is 'fla', but there is no CUDA device")
    run.parallel.moe_token_dispatcher_type = "flex"
    assert alike.kernels_of(run).startswith("moe_token_dispatcher_type is 'flex', but")
    assert {"transformer-engine", "flash-linear-attention", "triton"} <= {*alike.PACKAGES}


def test_the_odd_one_is_named_by_majority():
    hosts = [f"n{rank}" for rank in range(4)]
    parts = [{"a": "1", "b": "2"} for _ in hosts]
    assert alike.difference(hosts, parts) is None
    parts[0]["b"] = "3"
    assert alike.difference(hosts, parts) == (
        "b differs: rank 0 on n0 has 3, rank 1 on n1 has 2; give every rank the same"
    )
    parts[2]["a"] = "9"  # the first part in order, not in rank
    assert alike.difference(hosts, parts).startswith("a differs: rank 2 on n2 has 9, rank 0 on n0")
    del parts[2]["a"]
    assert alike.difference(hosts, parts).startswith("a differs: rank 2 on n2 has none")


def test_settings_that_may_differ_exist():
    keys = {".".join(leaf.path) for leaf in leaves(RunConfig)}
    assert alike.MAY_DIFFER.keys() <= keys


def test_code_of_the_users_own_is_compared(scenes, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    run = digits_run(scenes)
    run.plugins = ["my_plugin"]
    run.objectives["rl"].reward_funcs = ["my_rewards.judge(limit=3)", "exact"]
    for name in ("my_plugin", "my_rewards"):
        (tmp_path / f"{name}.py").write_text("a = 1\n")
    assert [*alike._own_modules(run)] == ["my_plugin", "my_rewards"]
    before = [alike._source(name) for name in ("my_plugin", "my_rewards", "no_module")]
    (tmp_path / "my_rewards.py").write_text("a = 2\n")
    after = [alike._source(name) for name in ("my_plugin", "my_rewards", "no_module")]
    assert before[0] == after[0] and before[1] != after[1] and before[2] == "no source file"


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 100_000])
def test_a_sample_sees_both_ends(tmp_path, size):
    path = tmp_path / "a"
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    first = alike._sample(path, alike.BLOCKS)
    assert first == alike._sample(path, alike.BLOCKS) and first.size == size
    for place in {0, size - 1} if size else ():
        content[place] ^= 128
        path.write_bytes(content)
        assert alike._sample(path, alike.BLOCKS).content != first.content
        content[place] ^= 128
