"""The plan of the real model: its size, and what the command says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from megatron_mm.config import ConfigError, load, preset, to_transformers_dict, without_clvr
from megatron_mm.convert.mapping import SIDES
from megatron_mm.model.blueprint import blueprint
from megatron_mm.perf import hardware
from megatron_mm.perf.fake import fake_engine, fake_job
from megatron_mm.perf.layout import plan_layout, too_large
from megatron_mm.perf.predict import collective
from megatron_mm.perf.search import search
from megatron_mm.perf.size import model_size
from megatron_mm.perf.standins import planned_backend

ROOT = Path(__file__).parents[2]
ASSUMED = hardware.Assumptions(compute=1.0, bandwidth=1.0, links=1.0)


def transformers_size(model) -> tuple[int, int]:
    """(total, active) of transformers' own model on no device."""
    words = to_transformers_dict(model, image_token_id=151671)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/meta_names.py"],
        input=json.dumps([words]),
        capture_output=True,
        text=True,
        check=True,
    )
    ((inside, _),) = json.loads(done.stdout)
    sizes = {name: prod(shape) for name, shape in inside.items()}
    routed = sum(n for name, n in sizes.items() if ".mlp.experts." in name)
    lm = model.language
    return sum(sizes.values()), sum(sizes.values()) - routed * (
        lm.num_experts - lm.moe_router_topk
    ) // lm.num_experts


# 16 s of CPU time: transformers builds the 80B model, on the meta device, in a process of its own.
@pytest.mark.slow
def test_the_size_is_that_of_transformers_and_clvr():
    model = preset("mm-80b")
    base = replace(model, hybrid_layer_pattern=without_clvr(model.hybrid_layer_pattern))
    clvr = sum(
        prod(layout.global_shape) for name, layout in blueprint(model).items() if SIDES.match(name)
    )
    total, active = transformers_size(base)
    assert model_size(model) == (total + clvr, active + clvr)
    assert total > 80e9 and active < 10e9 and clvr > 1e7


def test_ranks_hold_the_whole_model():
    run = load(argv=["--preset", "mm-80b", "--bf16", "--global-batch-size", "64"])
    run.parallel.pipeline_model_parallel_size, run.parallel.expert_model_parallel_size = 8, 32
    held = 0
    for place in range(8):
        with fake_job(run, place * 32, 256) as groups:
            engine = fake_engine(run, groups, planned_backend(run, "cuda", lambda n: None))
            for chunk in engine.chunks:
                for param in chunk.parameters():
                    held += param.numel() * (32 if param.param_layout.expert else 1)
    assert held == model_size(run.model).total


def test_collectives_by_hand():
    h100 = hardware.gpu("H100")
    near, far = range(8), range(0, 64, 8)
    assert collective("all_gather", 450e9, near, h100, ASSUMED) == pytest.approx(7.0)
    assert collective("all_reduce", 450e9, near, h100, ASSUMED) == pytest.approx(2 * 7 / 8)
    assert collective("reduce_scatter", 50e9, far, h100, ASSUMED) == pytest.approx(7 / 8)
    # of 16 ranks in two domains half the bytes leave, each through its own adapter
    assert collective("all_to_all", 50e9, range(16), h100, ASSUMED) == pytest.approx(0.5)
    assert collective("all_reduce", 1e9, range(1), h100, ASSUMED) == 0.0


def small_run(**sizes):
    run = load(argv=["--preset", "small", "--bf16", "--seq-length", "512"])
    run.training.global_batch_size, run.data.max_num_tiles = 32, 4
    for name, value in sizes.items():
        setattr(run.parallel, name, value)
    return run


def test_a_search_ranks_what_fits():
    class Silent:
        total = None
        update = set_description = staticmethod(lambda *_: None)

    run, h100 = small_run(), hardware.gpu("H100")
    found = search(run, 4, h100, ASSUMED, 1, 1.0, 2, Silent())
    seconds = [plan.prediction.seconds for plan in found.plans]
    assert len(seconds) == 2 and seconds == sorted(seconds)
    assert all(plan.fits for plan in found.plans)
    assert found.considered >= found.fitting >= 2
    tiny = replace(h100, memory=1e6)
    with pytest.raises(ConfigError, match=r"none of \d+ layouts fits: .* a H100 has 0\.0; allowed"):
        search(run, 4, tiny, ASSUMED, 1, 1.0, 2, Silent())


def test_a_layout_that_does_not_fit_says_what_to_change():
    small = replace(hardware.gpu("H100"), memory=1e8)
    plan = plan_layout(small_run(), 1, small, ASSUMED)
    assert not plan.fits
    with pytest.raises(ConfigError, match=r"needs \d.* GB .* a H100 has 0\.1; allowed: "):
        raise too_large(plan)


def run_tool(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/plan.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.launches
def test_the_command_writes_table_json_and_chart(tmp_path):
    flags = ["--preset", "small", "--seq-length", "512"]
    sizes = ["--pipeline-model-parallel-size", "2", "--world-size", "4", "--gpu", "H200"]
    files = ["--json", str(tmp_path / "plan.json"), "--chart", str(tmp_path / "plan.png")]
    done = run_tool(*flags, *sizes, *files, "--assume", "launch=2e-6")
    assert done.returncode == 0, done.stderr
    assert "4 samples a step, bf16" in done.stdout  # a preset says nothing of it
    assert "predicted: step" in done.stdout and "unvalidated until a GPU run" in done.stdout
    assert "of the step: products" in done.stdout and "the host's part: " in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["ranks"]) == 2 and plan["fits"] and plan["predicted"]["mfu"] > 0
    terms = plan["predicted"]["step_seconds_by_term"]
    assert sum(terms.values()) == pytest.approx(plan["predicted"]["step_seconds"])
    assert plan["assumed"]["launch"] == 2e-6 and all(rank["waits"] > 0 for rank in plan["ranks"])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


# With a GPU, as torch sees it: there until the variable hides it.
WITH_GPU = """
import os, runpy, sys
import torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.launches
@pytest.mark.parametrize("search", [[], ["search", "--top", "1"]])
def test_a_machine_with_a_gpu_plans_too(search):
    variables = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", WITH_GPU, str(ROOT / "tools/plan.py"), *search]
    done = subprocess.run(
        [*command, "--preset", "tiny", "--seq-length", "512", "--world-size", "1"],
        cwd=ROOT, env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "unvalidated until a GPU run" in done.stdout


@pytest.mark.launches
def test_the_command_says_whether_a_rollout_fits(tmp_path):
    """And how many sequences do: a configuration that asks for more is refused with that number."""
    flags = ["--preset", "small", "--seq-length", "4096", "--objective", "grpo"]
    flags += ["--reward-funcs", "math", "--recompute-granularity", "full", "--train-iters", "1"]
    flags += ["--max-completion-length", "64", "--world-size", "1", "--global-batch-size", "8"]
    large = run_tool(*flags, "--max-num-seqs", "20000")
    assert large.returncode == 2 and large.stderr.count("\n") == 1
    found = re.search(
        r"or (\S+) rollout\), .* allowed: --max-num-seqs (\d+) or fewer", large.stderr
    )
    assert found and float(found[1]) > 72
    fits = run_tool(*flags, "--max-num-seqs", found[2], "--json", str(tmp_path / "plan.json"))
    assert fits.returncode == 0, fits.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["predicted"]["max_num_seqs"] == int(found[2]) == plan["ranks"][0]["rollout"]["rows"]
    assert f"up to {found[2]} sequences (max_num_seqs) fit" in fits.stdout


@pytest.mark.launches
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "H10"], ["unknown GPU H10", "H100"]),
        (["--pipeline-model-parallel-size", "3"], ["world_size 4", "multiple of 3"]),
        (["--seq-length", "8"], ["seq_length 8", "max_num_tiles"]),
        (["--assume", "lunch=1"], ["unknown assumption lunch", "launch"]),
    ],
)
def test_bad_input_is_one_line(flags, words):
    base = ["--preset", "small", "--bf16", "--world-size", "4", "--global-batch-size", "4"]
    done = run_tool(*base, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)
