"""What the command refuses before it plans, what it says of each layout, and its picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_mm.config import RunConfig, load
from megatron_mm.perf import chart, command, search, table
from megatron_mm.perf.hardware import GPUS, Assumptions, gpu
from megatron_mm.perf.layout import LayoutPlan, plan_layout

H100, ASSUMED, GB = gpu("H100"), Assumptions(), 1e9


def tiny_run(*flags: str, micro: int = 1) -> RunConfig:
    words = ["--preset", "tiny", "--seq-length", "512", "--global-batch-size", "8"]
    run = load(argv=[*words, *flags])
    run.training.micro_batch_size = micro
    return run


def plan(run: RunConfig) -> LayoutPlan:
    return plan_layout(run, 2, H100, ASSUMED)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--supervised", "2"], "--supervised is 2; allowed: above 0, at most 1"),
        (["--supervised", "nan"], "--supervised is nan; allowed: above 0, at most 1"),
        (["--images", "-1"], "--images is -1; allowed: 0 or more"),
        (["--top", "0"], "--top is 0; allowed: 1 or more"),
        (["--world-size", "0"], "--world-size is 0; allowed: 1 or more"),
        (["--chart", "plan.jpeg2"], "--chart plan.jpeg2 ends with .jpeg2; allowed: .png, .svg"),
        (["--json", "/dev/null/plan.json"], "--json /dev/null/plan.json cannot be written: "),
        (["--chart", "/proc/plan.png"], "--chart /proc/plan.png cannot be written: "),
        (["--json", "/tmp"], "--json /tmp cannot be written: Is a directory; allowed: a file in"),
    ],
)
def test_it_refuses_before_it_plans(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("it began"))
    for way in ([], ["search"]):
        assert command.main([*way, "--world-size", "1", "--preset", "tiny", *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {words}") and said.count("\n") == 1


def test_a_file_is_made_when_there_is_something_to_write(tmp_path, monkeypatch):
    """In a folder that need not be there; an old file stays until then."""
    old, new = tmp_path / "old.json", tmp_path / "folder" / "new.json"
    old.write_text("old")
    for file in (old, new):
        command.check_writable(file, "--json")
    assert old.read_text() == "old" and not new.exists()
    command.write_json(new, {"a": 1})
    assert json.loads(new.read_text()) == {"a": 1}


def test_a_search_says_of_each_layout_what_is_assumed_of_it(tmp_path, monkeypatch, capsys):
    """The console, where one list stands for all layouts, says nothing of a micro batch there."""
    found = search.Found([plan(tiny_run(micro=2)), plan(tiny_run())], 2, 2)
    monkeypatch.setattr(search, "search", lambda *_: found)
    args = argparse.Namespace(
        world_size=2, images=1, supervised=1.0, top=2, json=tmp_path / "found.json"
    )
    assert command._search(args, found.plans[0].run, H100, ASSUMED) == 0
    said = capsys.readouterr().out
    assert "micro batch 2, recompute" in said and "micro batch 1, recompute" in said
    assert "8 samples a step, fp32; samples of 512 tokens, 1 images" in said
    assert "microbatch:" not in said
    layouts = json.loads(args.json.read_text())["layouts"]
    assert [
        [micro for micro in (1, 2) if f"microbatch: {micro} samples" in layout["assumptions"][0]]
        for layout in layouts
    ] == [[2], [1]]


def test_the_notes_name_the_peak_that_was_used():
    fp32, bf16 = plan(tiny_run()), plan(tiny_run("--bf16"))
    (said,) = [note for note in table.assumptions(fp32, 1, 1.0) if note.startswith("H100: ")]
    assert said.startswith("H100: 67.0 TFLOP/s in fp32, without TF32, 80 GB")
    (said,) = [note for note in table.assumptions(bf16, 1, 1.0) if note.startswith("H100: ")]
    assert said.startswith("H100: 989 dense bf16 TFLOP/s, for products in fp32 67.0 TFLOP/s")
    # By the peak of its precision, and never above what is assumed to be reached of it.
    for one, peak in ((fp32, 67e12), (bf16, 989.4e12)):
        model = table.as_dict(one, [])["ranks"][0]["model_flops"]
        assert one.prediction.mfu == pytest.approx(model / one.prediction.seconds / peak)
        assert one.prediction.mfu < ASSUMED.compute
    products = [one.prediction.by_term["products"] for one in (fp32, bf16)]
    assert products[0] > 2 * products[1]
    # In a run in bf16 the routers' products are in fp32.
    assert 0 < bf16.ranks[0].step.fp32 < 0.1 * bf16.ranks[0].step.flops
    assert fp32.ranks[0].step.fp32 == fp32.ranks[0].step.flops
    assert all(each.fp32_flops < each.bf16_flops / 10 for each in GPUS.values())


@pytest.mark.parametrize(
    ("flags", "encodes"),
    [
        ([], True),
        (["--vision-parallel", "replica"], False),
        (["--model.vision", "none"], False),
    ],
)
def test_the_picture_names_the_vit_where_it_is(flags, encodes):
    run = tiny_run(*([] if "none" in flags else flags))
    run.parallel.pipeline_model_parallel_size = 2
    if "none" in flags:
        run.model = replace(run.model, vision=None, hybrid_layer_pattern="GE *E GE *E")
        run.model.fusion.vision_memory = "none"
    drawn = plan(run)
    time, _ = chart.figure(drawn).axes
    names = [label.get_text() for label in time.get_xticklabels()]
    assert [name.endswith(" +ViT") for name in names] == [encodes, False]
    assert ("ViT" in table.table(drawn, [])) == encodes


@pytest.mark.parametrize("rollout", [None, SimpleNamespace(peak=60 * GB)])
def test_a_bar_is_as_high_as_a_rank_needs(rollout):
    whole = plan(tiny_run())
    whole = replace(whole, ranks=tuple(replace(rank, rollout=rollout) for rank in whole.ranks))
    _, memory = chart.figure(whole).axes
    tops = [bar.get_y() + bar.get_height() for bar in memory.patches]
    assert max(tops) == pytest.approx(whole.peak / GB)
    assert (max(tops) > 60) == (rollout is not None)
    labels = [text.get_text() for text in memory.get_legend().get_texts()]
    assert labels[-1] == ("activations" if rollout is None else "activations or rollout")
