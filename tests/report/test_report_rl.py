"""The report of a run of reinforcement learning: its pages, and what is left out without them.

A function that starts with `on_rank_` runs on every rank.
"""

import json
import multiprocessing
import re

import numpy as np
import pytest
import torch.distributed as dist

from examples.digits.scenes import DEFAULT_WEIGHTS
from megatron_mm.config import RunConfig, validate
from megatron_mm.parallel import groups
from megatron_mm.report.charts_rl import rl_charts
from megatron_mm.report.page import write_report
from megatron_mm.report.page_rl import MAX_GROUPS, hacked_steps, last_groups
from megatron_mm.train import loop
from support.grpo_runs import grpo_run
from support.trainers import PP2, TP2

SKILLS = ("ocr", "multihop/steps", "tip & <b>top</b>")


def record(step: int) -> dict:
    """A step's metrics as the trainer logs them; every second step begins a rollout."""
    found = {
        "iteration": step,
        "train/grad_norm": 1.0,
        "kl": 0.01 * step,
        "entropy": 1 / step,
        "clip_ratio/low_mean": 0.01,
        "clip_ratio/high_mean": 0.02,
        "clip_ratio/region_mean": 0.03,
        "train/train_rollout_logprob_abs_diff": 1e-7,
        "moe/router_loss": 0.3 / step,
    }
    found |= {f"moe/router_grad_norm/{layer}": 0.1 * layer for layer in (0, 3, 11)}
    if step % 2 == 0:
        return found
    found |= {
        "reward": 0.1 * step,
        "reward_std": 0.2,
        "frac_reward_zero_std": 0.5,
        "rewards/scorer/mean": 0.125,
        "rewards/router/mean": None if step == 3 else 0.0625,
        "rewards/router/frac_failed": 0.0,
        "completions/mean_length": 7.0,
        "completions/min_length": 2,
        "completions/max_length": 18,
        "completions/clipped_ratio": 0.0,
        "reward/task": 0.75,
        "rollout/moe/hit_rate": 0.4,
        "rollout/moe/chance": 0.2,
        "rollout/moe/hit_rate_shuffled": 0.21,
        "rollout/moe/mutual_information": 0.15,
        "rollout/moe/max_violation": 0.25,
        "rollout/moe/reward_hacking": 0.0,
    }
    for place, skill in enumerate(SKILLS):
        found[f"reward/task/{skill}"] = 0.9 - 0.1 * place
        found[f"rollout/moe/hit_rate/{skill}"] = 0.441 + 0.1 * place
    return found


def completion(step: int, row: str = "mix.jsonl:7", **changes) -> dict:
    text = "cell 1 is 5, <script>alert(1)</script>"
    return {
        "iteration": step,
        "row": row,
        "question": "<image>Hop from cell 1 & <script>tell</script>?",
        "key": "multihop/steps",
        "truth": "3 < 4",
        "completion": text,
        "finished": True,
        "rewards": {"scorer": 1.0, "router": 0.0625, "<i>late</i>": None},
        "advantage": 0.5,
        "right_spans": [True, False],
        "span_places": [[0, 11], [13, len(text)]],
    } | changes


def make_run(path, records: list[dict], rows: list[dict]):
    path.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics.jsonl", records), ("completions.jsonl", rows)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def page_of(path) -> str:
    return write_report(path).read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", [record(step) for step in range(1, 9)], [completion(7)])


def write_experts(path, keys=("a", "b"), layers=(1, 3), seed: int = 0) -> None:
    load = np.random.default_rng(seed).dirichlet(np.full(8, 2.0), size=(len(keys), len(layers)))
    experts = {"keys": [*keys], "layers": [*layers], "load": load.tolist()}
    path.write_text(json.dumps({"experts": experts}))


def test_every_metric_has_its_chart():
    charts = rl_charts([record(step) for step in range(1, 9)])
    named = {part: {c["name"]: c["last"] for c in charts[part]} for part in ("rewards", "skills")}
    assert named["rewards"] == {
        "all, weighted": "0.7",
        "deviation within a group": "0.2",
        "scorer": "0.125",
        "router": "0.0625",
    }
    assert named["skills"] == {
        "all skills": "0.75",
        "multihop/steps": "0.8",
        "ocr": "0.9",
        "tip & <b>top</b>": "0.7",
    }
    hits = {chart["name"]: chart["last"] for chart in charts["hits"]}
    assert hits["all skills"] == "40.0%" and hits["ocr"] == "44.1%" and len(hits) == 4
    assert len(charts["policy"]) == 7 and len(charts["experts"]) == 4


def test_what_was_not_measured_has_no_chart():
    """A run without a reference, a skill map or a shuffled one."""
    records = [record(step) for step in range(1, 9)]
    for kept in records:
        for key in [key for key in kept if key in ("kl", "moe/router_loss") or "moe/" in key]:
            del kept[key]
    charts = rl_charts(records)
    assert len(charts["policy"]) == 6 and not charts["hits"] and not charts["experts"]
    assert not any("KL" in chart["title"] for chart in charts["policy"])


def test_charts_that_end_at_nought_or_one_point_are_drawn():
    flat = [{"iteration": step, "reward": 0.0, "entropy": 0.0} for step in (1, 2)]
    assert [chart["last"] for chart in rl_charts(flat)["rewards"]] == ["0"]
    assert len(rl_charts(flat)["policy"]) == 1
    assert len(rl_charts(flat[:1])["rewards"]) == 1 and not rl_charts(flat[:1])["policy"]


def test_page_has_its_sections_only_after_rl(run, tmp_path):
    sections = ("Rewards", "Task reward by skill", "The policy", "Skills and their experts")
    page = page_of(run)
    for section in (*sections, "Completions of the last rollouts"):
        assert f"<h2>{section}</h2>" in page
    supervised = make_run(
        tmp_path / "sft", [{"iteration": 1, "train/lm_loss": 2.0}], [completion(1)]
    )
    page = page_of(supervised)
    assert not any(f"<h2>{section}" in page for section in (*sections, "Completions"))


def test_what_a_model_wrote_is_text(run):
    page = page_of(run)
    assert "<script" not in page and "<b>top" not in page and "<i>late" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "3 &lt; 4" in page
    assert "tip &amp; &lt;b&gt;top&lt;/b&gt;" in page and "&lt;i&gt;late&lt;/i&gt;" in page


def test_chart_ids_are_unique_and_colors_the_page_s(run):
    page = page_of(run)
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) > 20 and len(ids) == len(set(ids))
    assert "#0a0b0" not in page


def test_spans_are_marked_where_they_are(run):
    page = page_of(run)
    assert '<mark class="right">cell 1 is 5 ✓</mark>, <mark class="wrong">&lt;script' in page
    (group,) = last_groups([completion(7)])
    (shown,) = group["completions"]
    assert [verdict for _, verdict in shown["parts"]] == ["right", "", "wrong"]
    assert "".join(text for text, _ in shown["parts"]) == completion(7)["completion"]
    assert shown["rewards"] == ["1", "0.0625", "–"] and shown["advantage"] == "+0.50"
    assert (shown["right"], shown["spans"], shown["verdict"]) == (1, 2, "right")


def test_what_parts_spans_is_not_marked():
    """Tokens may begin with a comma or a space."""
    places = [[0, 1], [1, 4], [4, 6], [6, 6]]
    rows = [completion(1, completion="5, 3, x", span_places=places, right_spans=[True] * 4)]
    parts = last_groups(rows)[0]["completions"][0]["parts"]
    assert parts == [("5", "right"), (", ", ""), ("3", "right"), (", ", ""), ("x", "")]


def test_rows_without_spans_rewards_or_truth_are_shown(tmp_path):
    bare = {"iteration": 1, "row": "a:1", "completion": "", "finished": False, "truth": None}
    page = page_of(make_run(tmp_path / "run", [record(1)], [bare]))
    assert "(cut)" in page and "truth" not in page


def test_groups_are_the_newest_and_equal_completions_one_row():
    rows = [
        completion(step, row, advantage=a)
        for step in (1, 3, 5)
        for row in ("a:1", "b:2", "c:3", "d:4")
        for a in (0.0, 0.0, 1.0)
    ]
    groups = last_groups(rows)
    assert len(groups) == MAX_GROUPS == 8
    assert [group["iteration"] for group in groups] == [5] * 4 + [3] * 4
    assert [c["times"] for c in groups[0]["completions"]] == [2, 1]
    many = last_groups([completion(1, advantage=float(n)) for n in range(20)])
    assert many[0]["more"] == 4


def test_hacking_is_a_box_at_the_top(run, tmp_path):
    assert 'class="warning"' not in page_of(run)
    records = [record(step) for step in range(1, 30)]
    for hacked in records[20::2]:
        hacked["rollout/moe/reward_hacking"] = 1
    assert hacked_steps(records) == [21, 23, 25, 27, 29]
    page = page_of(make_run(tmp_path / "hacked", records, []))
    assert "At steps 21, 23, 25, 27, 29" in page and "router_reward_weight" in page
    assert page.index('class="warning"') < page.index("<h2>")


def test_experts_before_and_after_stand_side_by_side(run):
    write_experts(run / "evaluation.json", seed=1)
    assert "<h3>layer 1</h3>" in page_of(run)
    write_experts(run / "experts_before.json")
    titles = re.findall(r"<h3>(layer [^<]*)</h3>", page_of(run))
    assert titles == [f"layer {n}, {when}" for n in (1, 3) for when in ("before", "after")]
    write_experts(run / "experts_before.json", keys=("a", "c"))  # other questions
    assert re.findall(r"<h3>(layer [^<]*)</h3>", page_of(run)) == ["layer 1", "layer 3"]


def on_rank_train(run: RunConfig) -> int:
    validate(run, dist.get_world_size())
    # The pool's ranks are daemons, which may not start reward workers.
    multiprocessing.current_process()._config["daemon"] = False
    return loop.train(run, groups.build(run.parallel)).iteration


@pytest.mark.parametrize("sizes", [PP2, TP2, {}])
def test_a_run_knows_its_experts_before(ranks, scenes, tmp_path, sizes):
    """Where nothing is learnt, before is as after."""
    run = grpo_run(
        scenes,
        valid_data=str(scenes / "valid.jsonl"),
        output_dir=str(tmp_path),
        lr=1e-30,
        train_iters=2,
        max_new_tokens=4,
        report=True,
        **sizes,
    )
    assert ranks(2, on_rank_train, run) == [2, 2]
    before, after = (
        json.loads((tmp_path / f"{name}.json").read_text())["experts"]
        for name in ("experts_before", "evaluation")
    )
    assert (
        before == after
        and len(before["keys"]) == len(DEFAULT_WEIGHTS)
        and len(before["load"][0][0]) > 1
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Rewards</h2>" in page and "before</h3>" in page
    # The run's own table has all that the page shows.
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").open()]
    assert all(len(row["span_places"]) == len(row["right_spans"]) for row in rows)
