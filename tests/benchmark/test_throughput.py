"""Counts and comparisons of the throughput benchmark; no speed is asserted."""

from __future__ import annotations

import copy
import importlib
import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from megatron_mm.benchmark import command, compare, mock, scaling, table, throughput
from megatron_mm.benchmark.measure import Timed, interleave, ratios, turns
from megatron_mm.config import RunConfig, preset
from megatron_mm.config.settings import DataPhase
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.perf.flops import model_flops, total
from support.batches import microbatch, small_run
from support.tools import load_tool

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(scenes) -> RunConfig:
    run = RunConfig(model=preset("tiny"))
    run.model.hybrid_layer_pattern = "GE L *E J"
    run.data.train_data = [DataPhase(str(scenes / "mix.jsonl"))]
    run.data.tokenizer_model = str(scenes / "tokenizer.model")
    run.data.extra_columns = ["scene", "other_images"]
    run.data.seq_length, run.data.max_num_tiles = 128, 9
    run.training.micro_batch_size, run.training.global_batch_size = 2, 8
    return run


def on_rank(run: RunConfig, kinds: tuple, routings: tuple, rounds: int) -> dict:
    built = groups.build(run.parallel)
    return throughput.measure(run, built, kinds=kinds, routings=routings, rounds=rounds, warmup=0)


BOTH = ("real", "mock"), ("natural", "balanced")


def first_steps(run: RunConfig, count: int) -> list[dict[str, float]]:
    """Contents of the first steps of the data, read by one reader of all of it."""
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    loader = TrainLoader(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    found = []
    for _ in range(count):
        batches = loader.next_batch()
        supervised = [int((b.loss_mask_T > 0).sum()) for b in batches]
        found.append({
            "samples": sum(len(b.samples) for b in batches),
            "tokens": sum(b.num_real_tokens for b in batches),
            "supervised": sum(supervised),
            "tiles": sum(len(b.pixels_NCHW) for b in batches),
            "model_flops": sum(
                total(model_flops(run, b, n)) for b, n in zip(batches, supervised, strict=True)
            ),
        })  # fmt: skip
    return found


@pytest.mark.parametrize("layout", ["replicas", "stages", "encoder beside"])
def test_a_run_is_measured_on_its_layout(ranks, run, layout):
    """Its work is that of all ranks: so are the tiles that are dealt to an encoder on each."""
    run.parallel.pipeline_model_parallel_size = 1 if layout == "replicas" else 2
    run.parallel.vision_parallel = "replica" if layout == "encoder beside" else "stage"
    one, other = ranks(2, on_rank, run, *BOTH, 2)
    assert one["sides"] == other["sides"]
    assert list(one["sides"]) == ["real, natural", "mock, natural", "mock, balanced"]
    # Steps 0 and 1 are in memory. Of each block the first step is not timed, so with real data
    # steps 1 and 2 are, with mock data what is like steps 1 and 0.
    steps = first_steps(run, 3)
    expected = {"real": [steps[1], steps[2]], "mock": [steps[1], steps[0]]}
    for name, side in one["sides"].items():
        assert side["work"] == expected[name.split(",")[0]]
        speeds = [w["tokens"] for w in side["work"]]
        low, high = side["seconds"]["quartiles"]
        shortest = low - (high - low) / 2  # of two rounds, a quarter of whose distance low is above
        assert 0 < side["tokens_per_second"]["median"] < max(speeds) / shortest * (1 + 1e-9)
        # A share of the slowest rank's seconds; the ranks wait for each other at the end.
        whole = sum(entry["seconds"] for entry in side["phases"].values())
        assert 0 < whole <= side["seconds"]["mean"]
        assert {"forward", "backward", "optimizer", "data", "other"} <= side["phases"].keys()
        assert any(kind.startswith("dp") for kind in side["phases"]) == (layout == "replicas")
        assert ("pp send/recv" in side["phases"]) == (layout != "replicas")
        assert ("encode" in side["phases"]) == (layout == "encoder beside")
        peak = one["gemm_flops_per_second_per_rank"]
        rate = side["model_tflops_per_second_per_rank"] * 1e12
        assert side["mfu"] == pytest.approx(rate / peak)
    # Only real data are decoded and shared while the clock runs.
    shared = "world all-reduce"
    assert shared in one["sides"]["real, natural"]["phases"]
    assert shared not in one["sides"]["mock, natural"]["phases"]
    assert one["memory"]["peak_resident_bytes"] > 1e8 and one["units"] == {"rank": "CPU process"}
    said = table.text(one)
    assert "MFU" in said and "mock, balanced: " in said and "backward" in said


def test_without_data_full_samples_are_made(ranks, run):
    run.data.train_data = []
    result, _ = ranks(2, on_rank, run, ("mock",), ("natural",), 1)
    (work,) = result["sides"]["mock, natural"]["work"]
    assert work["samples"] == 8 and work["tokens"] == 8 * 128 and work["tiles"] == 8 * 10


def test_mock_data_has_the_sizes_of_the_real(run):
    model = small_run().model
    batch = microbatch(model, 1)
    made, again, other = (mock.mock_like(batch, 90, seed) for seed in (1, 1, 2))
    assert made.tokens_T.equal(again.tokens_T) and made.pixels_NCHW.equal(again.pixels_NCHW)
    assert not made.tokens_T.equal(other.tokens_T) and not made.tokens_T.equal(batch.tokens_T)
    at = batch.stream_positions
    assert made.tokens_T[at].equal(batch.tokens_T[at])
    assert made.pixels_NCHW.shape == batch.pixels_NCHW.shape
    assert made.cu_seqlens is batch.cu_seqlens and made.loss_mask_T is batch.loss_mask_T


def test_balanced_routes_give_every_expert_as_many_tokens():
    model = small_run().model
    batch = mock.balanced(microbatch(model, 1), [0, 3], model)
    for routes in batch.routes.values():
        counts = torch.bincount(routes.flatten().long(), minlength=6)
        assert routes.shape[1] == 2 and counts.max() - counts.min() <= 1
        assert (routes[:, 0] != routes[:, 1]).all()


def result_of(run: RunConfig) -> dict:
    work = [{"samples": 8, "tokens": 800, "supervised": 90, "tiles": 80, "model_flops": 1e9}] * 2
    speed = {"median": 100.0, "quartiles": [90.0, 110.0]}
    side = {"work": work, "mfu": 0.1, "tokens_per_second": speed, "rounds": 2}
    return {
        "run": importlib.import_module("megatron_mm.config").to_dict(run),
        "sides": {"mock, natural": side | {"supervised_tokens_per_second": speed}},
        "units": {"rank": "CPU process"},
        "layout": {"world_size": 2},
    }


def test_results_of_the_same_work_compare(run, tmp_path):
    a, b = result_of(run), result_of(run)
    b["run"]["parallel"]["tensor_model_parallel_size"] = 2  # how it is computed may differ
    b["run"]["training"]["recompute_granularity"] = "full"
    b["layout"]["world_size"] = 4
    b["sides"]["mock, natural"]["tokens_per_second"] = {
        "median": 300.0,
        "quartiles": [270.0, 330.0],
    }
    found = compare.compare(a, b)["mock, natural"]
    assert found["ratio"] == 3 and found["ratio_per_rank"] == 1.5
    assert found["range"] == [270 / 110, 330 / 90]
    assert "B / A 3.000 (2.455 to 3.667), by rank 1.500" in compare.text({"mock, natural": found})


DIFFERENT = {
    "the model": (("run", "model", "language", "num_experts"), 16, "model.language.num_experts"),
    "sequence length": (("run", "data", "seq_length"), 256, "data.seq_length is 128 in A and 256"),
    "precision": (("run", "training", "bf16"), True, "training.bf16 is False in A and True in B"),
    "what learns": (("run", "training", "freeze_vision"), True, "training.freeze_vision"),
    "the unit": (("units", "rank"), "GPU", "is 'CPU process' in A and 'GPU' in B"),
    "tokens": (("sides", "mock, natural", "work", 1, "tokens"), 801, "tokens of 'mock, natural'"),
    "tiles": (("sides", "mock, natural", "work", 0, "tiles"), 79, "is 80 in A and 79 in B"),
    "routing": (("sides",), {"mock, balanced": {}}, "A has mock, natural, B has mock, balanced"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_work_is_not_compared(run, case):
    path, value, words = DIFFERENT[case]
    a, b = result_of(run), copy.deepcopy(result_of(run))
    node = b
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(compare.Different) as error:
        compare.compare(a, b)
    assert words in str(error.value) and "\n" not in str(error.value)


OF_OBJECTIVES = {
    "a teacher's tokens": (
        "sft",
        ("mimic", "mimic_kd_coeff"),
        0.5,
        "mimic_kd_coeff is False",
    ),
    "alignment": ("sft", ("earl", "router_align_coeff"), 0.4, "earl.router_align_coeff is False"),
    "a reference": ("grpo", ("rl", "ref_load"), "runs/sft", "rl.ref_load is False in A and True"),
    "teachers": ("grpo", ("rl", "teacher_load"), ["=runs/a"], "rl.teacher_load is 0 in A"),
    "replay": ("grpo", ("rl", "routing_replay"), "R3", "rl.routing_replay is 'none' in A"),
    "filters": ("grpo", ("rl", "filter_groups"), True, "rl.filter_groups is None in A and True"),
    "losses": (
        "dpo",
        ("dpo", "loss_type"),
        ["sigmoid", "sft"],
        "loss_type is ['sigmoid'] in A",
    ),
}


@pytest.mark.parametrize("case", OF_OBJECTIVES)
def test_another_loss_is_different_work(run, case):
    objective, (section, key), value, words = OF_OBJECTIVES[case]
    run.training.objective = objective
    a, b = result_of(run), copy.deepcopy(result_of(run))
    b["run"][section][key] = value
    with pytest.raises(compare.Different) as error:
        compare.compare(a, b)
    assert words in str(error.value)


@pytest.mark.parametrize(("key", "values"), [("ref_load", "ab"), ("max_num_seqs", (8, 64))])
def test_the_same_work_on_other_machines_compares(run, key, values):
    """Files lie elsewhere, and as many sequences decode together as fit."""
    run.training.objective = "grpo"
    a, b = result_of(run), copy.deepcopy(result_of(run))
    for side, value in zip((a, b), values, strict=True):
        side["run"]["rl"][key] = value
    assert compare.compare(a, b)["mock, natural"]["ratio"] == 1


def test_a_result_from_before_a_setting_compares(run):
    a, b = result_of(run), copy.deepcopy(result_of(run))
    del a["run"]["mimic"], a["run"]["earl"]["expert_scope"]
    assert compare.compare(a, b)["mock, natural"]["ratio"] == 1


def test_of_rollouts_only_the_completions_are_counted(run):
    run.training.objective = "grpo"
    a, b = result_of(run), copy.deepcopy(result_of(run))
    b["sides"]["mock, natural"]["work"][0]["tokens"] = 7
    assert compare.compare(a, b)["mock, natural"]["ratio"] == 1
    b["sides"]["mock, natural"]["work"][0]["samples"] = 7
    with pytest.raises(compare.Different, match="samples of 'mock, natural', round 1"):
        compare.compare(a, b)


def test_the_command_refuses_in_one_line(run, tmp_path, capsys):
    tool = load_tool("benchmark")
    (tmp_path / "a.json").write_text("{}")
    assert tool.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/a.json is no result of")
    assert tool.main(["rl", "--preset", "tiny"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "error: benchmark.py rl is for objective grpo, this run's is sft; "
        "allowed: benchmark.py train\n"
    )
    for flags, words in (
        (["--data", "mock", "--objective", "dpo"], "its objective is dpo, or it learns from a map"),
        (["--data", "real", "--routing", "balanced"], "--routing balanced needs batches in memory"),
    ):
        given = ["--preset", "tiny", "--train-data", "rows.jsonl", "--tokenizer-model", "t.model"]
        assert tool.main(["train", *given, "--global-batch-size", "2", *flags]) == 1
        assert words in capsys.readouterr().err
    for words, message in (
        (["train"], "train needs a run: --config FILE"),
        (["faults", "--preset=tiny"], ""),
        (["gdn", "--rounds", "0"], "--rounds 0 --warmup 4; at least 1 and 0"),
        (["scaling", "--warmup", "-1"], "--rounds 10 --warmup -1; at least 1 and 0"),
        (["clvr", "--models", "mm-80b"], "invalid choice: 'mm-80b' (choose from"),
    ):
        if message:
            with pytest.raises(SystemExit):
                tool.main(words)
        else:
            assert tool.main(words) == 1
            message = "error: faults need a run: --config FILE"
        assert message in capsys.readouterr().err
    good = tmp_path / "good.json"
    good.write_text(json.dumps(result_of(run)))
    assert tool.main(["compare", str(good), str(good)]) == 0
    assert "B / A 1.000" in capsys.readouterr().out


def test_a_run_is_named_as_the_trainer_takes_it(monkeypatch, tmp_path, capsys):
    """`--config FILE` or `--config=FILE`, anywhere; and a file that cannot be written is told
    before anything is measured."""
    tool = load_tool("benchmark")
    begun: list = []
    monkeypatch.setattr(command, "_run", lambda args, flags: begun.append(flags))
    for flags in (["--config=a.yaml"], ["--lr", "1", "--config", "a.yaml"], ["--preset=tiny"]):
        assert tool.main(["train", *flags, "--json", str(tmp_path / "new" / "a.json")]) == 0
        assert begun.pop() == flags
    assert tool.main(["train", "--preset", "tiny", "--json", "/dev/null/a.json"]) == 1
    assert capsys.readouterr().err.startswith("error: --json /dev/null/a.json cannot be written: ")
    assert not begun


def test_quartiles_lie_among_what_was_measured():
    assert throughput.spread([1.0, 10.0]) == {"median": 5.5, "quartiles": [3.25, 7.75]}
    assert throughput.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "quartiles": [1.5, 2.5]}
    assert throughput.spread([7.0]) == {"median": 7.0, "quartiles": [7.0, 7.0]}
    slow, fast = ([Timed(s, s, None) for s in side] for side in ((1.0, 10.0), (1.0, 1.0)))
    assert ratios(slow, fast)["ratio_quartiles"] == [3.25, 7.75]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_side_has_every_turn(count):
    """And goes before each other one as often as after it."""
    orders = list(turns("abcd"[:count], 2 * count))
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(2 * "abcd"[:count])
    for one, other in combinations("abcd"[:count], 2):
        assert sum(order.index(one) < order.index(other) for order in orders) == count
    calls: list = []
    sides = [lambda number, name=name: calls.append((number, name)) for name in "abcd"[:count]]
    found = interleave(sides, 2 * count)
    assert [name for _, name in calls] == [name for order in orders for name in order]
    assert [len(side) for side in found] == [2 * count] * count


def test_the_schedule_in_theory():
    def even(forward: list[float], backward: list[float], microbatches: int) -> float:
        each = ([[s] * microbatches for s in stages] for stages in (forward, backward))
        return scaling.one_forward_one_backward(*each)

    assert even([1.0], [2.0], 5) == 15
    for stages in (2, 3, 4):  # (m + p - 1) (f + b)
        assert even([1.0] * stages, [2.0] * stages, 6) == (6 + stages - 1) * 3
    # By hand: the second stage is idle until 1, then it is the slower one: 3 x (2 + 2), and the
    # first one's last backward pass.
    assert even([1.0, 2.0], [1.0, 2.0], 3) == 1 + 12 + 1
    assert even([1.0, 1.0], [1.0, 1.0], 1) == 4  # fewer microbatches than stages
    # One slow pass on the first stage delays the second, which then has 2 and 2 left of it.
    slow = [[1.0, 5.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]
    assert scaling.one_forward_one_backward(*slow) == 1 + 5 + 1 + 1 + 1


def scaled() -> dict:
    """Two steps of each side, smaller ones; what became of the weights."""
    scaling.SAMPLES, scaling.TOKENS, scaling.MICROBATCHES = 1, 40, 2
    sides = scaling.make_sides()
    found = scaling.in_turn(sides, 2, 0)
    weights = {
        name: {key: p.detach().clone() for key, p, _ in layouts(*sides[name].engine.chunks)}
        for name in sides
    }
    parts = [set(note["phases"]) for note in found["alone"][0]]
    pairs = {n: [(p, weights["alone"][k]) for k, p in weights[n].items()] for n in weights}
    # Gradients over equal microbatches are the mean, whoever adds them up; Adam magnifies what
    # rounding leaves, by up to its rate (1e-4) where a gradient is nearly 0.
    apart = {n: max(float((a - b).abs().max()) for a, b in pair) for n, pair in pairs.items()}
    return {"parts": parts, "apart": apart, "summary": scaling.summary(found)}


def test_scaling_compares_equal_work(ranks):
    first, last = ranks(2, scaled)
    for found in (first, last):
        assert found["parts"] == [{"forward", "backward", "optimizer", "other"}] * 2  # it is alone
        assert found["apart"]["data parallel"] < 1e-4
        summary = found["summary"]
        assert summary["rounds"] == 2 and summary["data_parallel_efficiency"]["median"] > 0
        # What the stages compute, in the best order, is no more than what was measured.
        assert 0 < summary["pipeline_theory_over_measured"]["median"] <= 1
    assert scaling.text(first["summary"]).count("\n") == 3
