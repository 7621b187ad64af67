"""The tools as users call them: exit status, report, and what is on disk afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import save_file

from megatron_mm.benchmark.hf_weights import transformers_model
from support.folders import (
    SIX_B,
    assert_same,
    base_model,
    read_all,
    save_fused,
    save_released_fused,
    save_text,
)
from support.tools import load_tool

ROOT = Path(__file__).parent.parent.parent


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(capsys):
    """`call(tool, *flags)` in this process."""

    def run(tool: str, *args) -> Done:
        capsys.readouterr()
        status = load_tool(tool.removesuffix(".py")).main([str(arg) for arg in args])
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def done(call):
    def run(tool: str, *args) -> str:
        found = call(tool, *args)
        assert found.returncode == 0, found.stderr
        return found.stdout

    return run


def torchrun(tool: str, *args) -> str:
    """By two ranks, in processes of their own."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    found = subprocess.run(
        [*start, str(ROOT / "tools" / tool), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hf")
    save_fused(made, base_model(**SIX_B))
    return made


@pytest.mark.launches
def test_there_and_back_by_two_ranks(folder, tmp_path, call, done):
    token = {"id": 95, "content": "<IMG_CONTEXT>", "special": True}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    template = "{% for p in messages[0].content %}{{ p.text or '<IMG_CONTEXT>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "evil.py").write_text("raise SystemExit")
    said = torchrun(
        "hf_to_megatron.py",
        *("--hf", folder, "--out", tmp_path / "mega", "--tensor-model-parallel-size", 2),
    )
    assert "-> 91 mcore tensors" in said and "converted:" in said
    done("megatron_to_hf.py", "--checkpoint", tmp_path / "mega", "--out", tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), read_all(folder))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "evil.py").exists()
    said = done("check_parity.py", "--hf", folder, "--checkpoint", tmp_path / "mega")
    assert "tensors are bitwise identical" in said and "3 prompts" in said
    # The weights of one expert off by the last bit of one number.
    other = tmp_path / "other"
    other.mkdir()
    tensors = read_all(folder)
    name = "language_model.model.layers.2.mlp.experts.4.down_proj.weight"
    tensors[name].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text((folder / "config.json").read_text())
    found = call("check_parity.py", "--hf", other, "--checkpoint", tmp_path / "mega")
    assert found.returncode == 1 and f"1 tensors differ (first {name}" in found.stderr


def test_dry_runs(folder, tmp_path, call, done):
    args = ("--hf", folder, "--out", tmp_path / "mega", "--dry-run")
    looks = ("--hybrid-layer-pattern", "GE L *E GE J *E", "--vision-memory", "tiles")
    said = done("hf_to_megatron.py", *args, *looks)
    assert "new, from the seed (10)" in said and "language.looks.0.linear_q.weight" in said
    tensors = read_all(folder)
    tensors["odd"] = tensors.pop("language_model.model.norm.weight")
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    save_file(tensors, spoilt / "model.safetensors")
    (spoilt / "config.json").write_text((folder / "config.json").read_text())
    found = call("hf_to_megatron.py", "--hf", spoilt, *args[2:])
    assert found.returncode == 1
    assert "missing (1): language_model.model.norm.weight" in found.stdout
    assert "unexpected (1): odd" in found.stdout
    (spoilt / "model.safetensors").unlink()
    said = done("hf_to_megatron.py", "--hf", spoilt, *args[2:])  # from the config alone
    names = len(transformers_model(base_model(**SIX_B)).state_dict())
    assert f"{names - 8 + 4 * 6 * 3} tensors" in said  # experts one by one
    assert not (tmp_path / "mega").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (("--tensor-model-parallel-size", "3"), "tensor_model_parallel_size"),
        (("--lr", "1"), "--lr is not for converting"),
        (("--hybrid-layer-pattern", "GE *E"), "has the layers GE*E"),
        (("--dtype", "int4"), "--dtype"),
    ],
)
def test_settings_that_are_wrong(folder, tmp_path, call, args, words):
    found = call("hf_to_megatron.py", "--hf", folder, "--out", tmp_path / "mega", *args)
    assert found.returncode == 2 and words in found.stderr
    assert found.stderr.count("\n") == 1 and not (tmp_path / "mega").exists()


@pytest.mark.parametrize("style", [{}, SIX_B], ids=["300M", "6B"])
def test_parity_with_a_release(tmp_path, call, done, style):
    """transformers cannot load its names, so they reach its model by the table."""
    model = base_model(**style)
    save_released_fused(tmp_path / "in", model, transformers_model(model))
    done("hf_to_megatron.py", "--hf", tmp_path / "in", "--out", tmp_path / "mega")
    compare = ("check_parity.py", "--hf", tmp_path / "in", "--checkpoint", tmp_path / "mega")
    assert "every layer and the logits agree" in (said := done(*compare)) and "3 prompts" in said
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["img_context_token_id"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    found = call(*compare)
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "does not say which token is <IMG_CONTEXT>" in found.stderr


def test_a_release_that_computes_something_else(tmp_path, call, done, monkeypatch):
    """The comparison of layers sees what is wrong in ours alone."""
    from megatron_mm.convert import parity

    model = base_model()
    save_released_fused(tmp_path / "in", model, transformers_model(model))
    done("hf_to_megatron.py", "--hf", tmp_path / "in", "--out", tmp_path / "mega")
    build = parity.mcore_model

    def spoilt(*args):
        made = build(*args)
        scale = next(p for n, p in made.named_parameters() if n.endswith("layers.1.scale1"))
        scale.data.mul_(1.01)
        return made

    monkeypatch.setattr(parity, "mcore_model", spoilt)
    found = call("check_parity.py", "--hf", tmp_path / "in", "--checkpoint", tmp_path / "mega")
    assert found.returncode == 1 and "tiles: layer 0 is the first to part" in found.stderr


def test_a_text_only_folder(tmp_path, done):
    save_text(tmp_path / "in")
    said = done("hf_to_megatron.py", "--hf", tmp_path / "in", "--out", tmp_path / "mega")
    assert "carried along, not trained (3)" in said
    said = done("check_parity.py", "--hf", tmp_path / "in", "--checkpoint", tmp_path / "mega")
    assert "1 prompts" in said
