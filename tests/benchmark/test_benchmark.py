"""The benchmark runs and says what it should; how fast anything was is not asserted."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
PEAKS = ("ours", "transformers")
VERSIONS = {"cpu", "cores", "threads", "python", "torch", "transformers", "megatron-core"}


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capfd):
    """In this process, which has torch and transformers imported already."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("benchmark")

    def run(*args: str) -> dict:
        file = tmp_path / "out.json"
        capfd.readouterr()
        assert tool.main([*args, "--json", str(file)]) == 0
        return read(file, capfd.readouterr().out)

    return run


def read(file: Path, said: str) -> dict:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(said) == found and set(found["environment"]) == VERSIONS
    return found


# 10 s of CPU time: both sides are built, compared and timed.
@pytest.mark.slow
def test_train_against_transformers(benchmark):
    arguments = "train --against transformers --models tiny --samples 2 --rounds 3 --warmup 0"
    found = benchmark(*arguments.split())["models"]["tiny"]
    assert len(found["losses"]) == found["rounds"] == 3
    assert found["ratio"] > 0 and found["ratio_quartiles"][0] <= found["ratio_quartiles"][1]
    assert found["ours_tokens_per_second"] > 0 and found["transformers_tokens_per_second"] > 0
    assert found["memory"].keys() == {"padded", "one by one"}
    for memory in (sides[key] for sides in found["memory"].values() for key in PEAKS):
        # Weights and both moments of Adam stay between steps, in fp32.
        assert memory["kept_bytes"] >= 3 * 4 * found["parameters"]
        assert memory["peak_bytes"] == memory["kept_bytes"] + memory["step_bytes"]
    # Both compute the same steps: fp32 rounding at first (2e-7 measured), which Adam then
    # magnifies (2e-6 after three updates). Another weight or label is seen at 1e-2.
    assert max(found["loss_differences"]) < 1e-4


def test_delta_rule(benchmark):
    shapes = benchmark("gdn", "--rounds", "1", "--warmup", "0")["shapes"]
    assert {s["length"] for s in shapes} == {24, 256, 2048}
    assert {s["head_width"] for s in shapes} == {16, 64, 128}
    # Two fp32 algorithms, output and every gradient; measured up to 1e-6.
    assert max(s["largest_difference"] for s in shapes) < 1e-5


def test_clvr(benchmark):
    arguments = "clvr --models tiny --samples 3 --rounds 2 --warmup 0"
    found = benchmark(*arguments.split())["models"]["tiny"]
    tokens = found["tokens_per_step"]
    assert tokens["looking"] == tokens["blind"]
    assert sum(tokens["looking"]) < sum(tokens["full"])
    assert 1.0 < found["clvr_flops_ratio"] < 2.0
    assert found["summary_over_full_stream"]["rounds"] == 2


@pytest.mark.launches
def test_convert_against_a_copy(tmp_path):
    """In a process of its own: what is measured is its memory."""
    file = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "convert", "--json", str(file)]
    command += f"--gigabytes 0.1 --rounds 1 --warmup 0 --folder {tmp_path}".split()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read(file, done.stdout)
    assert found["bytes"] > 0.1e9 and found["tensors"] > 50 and found["copy"]["ratio"] == 1
    for side in ("hf_to_megatron", "megatron_to_hf"):
        assert found[side]["ratio"] > 0 and found[side]["bytes_per_second"] > 0
        # Python, torch and megatron-core alone are half of what is allowed here.
        assert 0 < found[side]["peak_bytes"] < found["allowed_peak_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_reinforcement_learning(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # importing it fails, installed or not
    arguments = "rl --against transformers --models tiny --rounds 1 --warmup 0 --tokens 4"
    found = benchmark(*arguments.split())
    found = found["models"]["tiny"]
    assert found["grpo_step"].startswith("not installed") and "pip install" in found["grpo_step"]
    drawn = found["generation"]
    assert len(set(drawn["prompt_tiles"])) > 2 and len(set(drawn["prompt_tokens"])) > 2
    # With images and text, of four lengths: a tile in the wrong row or a padded state shows.
    assert drawn["prompts_of_equal_greedy_tokens"] == {"padded": 4, "prompt by prompt": 4}
    assert drawn["ratio"] > 0 and drawn["with_recorded_routes"]["ratio"] > 0
    growth = found["token_at_512_over_16"]
    assert growth.keys() == {"gated delta rule", "attention"}
    # It reads 32 times the positions; 3.4 times the processor time measured.
    assert growth["attention"]["cpu_ratio"] > growth["gated delta rule"]["cpu_ratio"] > 0


def test_a_step_of_grpo_without_trl(benchmark):
    """Our side of the comparison: completions of the asked length, and weights that move."""
    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    rl, grpo, prompts = (
        importlib.import_module(f"megatron_mm.benchmark.{n}") for n in ("rl", "grpo", "prompts")
    )
    run = rl._run("tiny")
    samples = prompts.make_prompts(run, "tiny", 2, images=False, seed=0)
    grpo.grpo_run(run, 2, 4, 5, max(len(sample.tokens_T) for sample in samples))
    groups.start(ParallelConfig())
    try:
        ours = grpo.OurGRPO(run, groups.build(ParallelConfig()), prompts.Prompts(samples))
        weight = ours.engine.chunks[0].output_layer.weight
        before = weight.detach().clone()
        lengths = [ours.step(), ours.step()]
        ours.close()
    finally:
        groups.stop()
    assert lengths == [5.0, 5.0] and not weight.equal(before)


@pytest.fixture
def pairs():
    """Our side of the comparison of DPO steps on two pairs of text, transformers' model of the same
    weights, the pairs and their microbatch."""
    from megatron_mm.config import ParallelConfig, without_clvr
    from megatron_mm.parallel import groups

    models, made, dpo, sides = (
        importlib.import_module(f"megatron_mm.benchmark.{n}")
        for n in ("models", "pairs", "dpo_sides", "sides")
    )
    run = models.make_run("tiny", image_stream="all", vision_memory="none")
    run.model.hybrid_layer_pattern = without_clvr(run.model.hybrid_layer_pattern)
    drawn = made.make_pairs(run, "tiny", 2, equal=False, seed=0)
    dpo.dpo_run(run, 2, max(max(pair.lengths) for pair in drawn))
    theirs = sides.Theirs(run)
    sides.randomise(theirs.model, seed=0)
    groups.start(ParallelConfig())
    try:
        ours = dpo.OurDPO(run, groups.build(ParallelConfig()))
        sides.same_weights(ours, theirs)
        yield ours, theirs.model, drawn, made.our_batch(run, drawn)
    finally:
        groups.stop()


def answer_logps(model, pairs) -> torch.Tensor:
    """The log-probability of every answer, chosen and rejected by turns, one by one, without
    padding."""
    found = []
    for pair in pairs:
        for answer in pair[1:]:
            tokens = torch.cat([pair.prompt, answer])
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            logps = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            found.append(logps[len(pair.prompt) - 1 :].sum())
    return torch.stack(found)


def test_a_step_of_dpo_without_trl(pairs):
    """Our side of the comparison: ln 2 at first; then the loss and the gradient's norm that
    transformers' model gives by DPO's formula, and a reference that stays."""
    from megatron_mm.benchmark.sides import same_weights

    ours, model, drawn, batch = pairs
    assert ours.step(batch) == pytest.approx(math.log(2), rel=1e-7)
    with torch.no_grad():
        reference = answer_logps(model, drawn)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(1.1)
    same_weights(ours, SimpleNamespace(model=model))
    logps = answer_logps(model, drawn) - reference
    loss = -torch.nn.functional.logsigmoid(0.1 * (logps[0::2] - logps[1::2])).mean()
    loss.backward()
    loss = float(loss.detach())
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert abs(loss - math.log(2)) > 0.01
    # fp32, sums over answers in another order; measured 1e-7 and 1e-6.
    assert ours.gradients(batch) == pytest.approx(loss, rel=1e-5)
    assert ours.norm() == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("equal", [False, True])
def test_pairs_of_both_sides_are_the_same(equal):
    """Words of one side are the token ids of the other, also where a word holds another."""
    models, made, prompts = (
        importlib.import_module(f"megatron_mm.benchmark.{n}")
        for n in ("models", "pairs", "prompts")
    )
    run = models.make_run("tiny")
    drawn = made.make_pairs(run, "tiny", 4, equal=equal, seed=0)
    assert len({length for pair in drawn for length in pair.lengths}) == 1 or not equal
    assert (made.padding(drawn) == 0) == equal
    end, batch = made.end_token(run), made.our_batch(run, drawn)
    tokenize = prompts.their_tokenizer(run, end)
    samples = iter(batch.tokens_T.split(batch.cu_seqlens.diff().tolist()))
    for row in made.their_rows(drawn):
        for answer in ("chosen", "rejected"):  # TRL puts the end behind
            given = tokenize(row["prompt"] + row[answer] + "<end>")["input_ids"]
            assert given == next(samples).tolist() and given[-1] == end
    assert batch.lengths_N.tolist() == [len(a) for pair in drawn for a in pair[1:]]
    every = torch.arange(run.model.language.vocab_size)
    assert prompts.their_tokenizer(run)(prompts.words(every))["input_ids"] == every.tolist()


def test_dpo_without_trl_says_how_to_install_it(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # importing it fails, installed or not
    found = benchmark("dpo", "--models", "tiny", "--rounds", "1")["models"]["tiny"]
    assert found.startswith("not installed") and "pip install" in found


def test_dpo_against_trl(benchmark):
    """Where TRL is installed: it raises unless both sides compute the same."""
    missing = importlib.import_module("megatron_mm.benchmark.grpo").trl_is_missing("DPOTrainer")
    if missing:
        pytest.skip(missing)
    arguments = "dpo --models tiny --pairs 2 --rounds 2 --warmup 0"
    found = benchmark(*arguments.split())["models"]["tiny"]
    for loss in found["agreement"]["loss_at_reference"]:
        assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert found["drawn"]["padding"] > found["equal"]["padding"] == 0
    for kind in ("drawn", "equal"):
        assert found[kind]["ratio"] > 0
        assert found[kind]["by_layout"].keys() == {"padded", "pair by pair"}
