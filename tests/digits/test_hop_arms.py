"""The comparison of cascaded experts: its jobs, and its table on runs written by hand."""

from __future__ import annotations

import json

import pytest

from examples.digits import compare_arms, hop_arms, hop_table
from examples.digits.jobs import DIGITS, one_stage
from megatron_mm.config import load, validate
from support.arms import trained


def test_the_config_is_the_demo_with_a_second_hop():
    path = str(DIGITS / "cascaded_experts.yaml")
    run = load(path, [])
    validate(run, 2)
    validate(load(path, one_stage(hop_arms.CASCADE)), 1)
    demo = load(str(DIGITS / "demo.yaml"), [])
    assert run.model.language == demo.model.language and run.optimizer == demo.optimizer
    assert run.model.hybrid_layer_pattern.replace("C", "E") == demo.model.hybrid_layer_pattern


def write_run(folder, right: dict[str, int], shares: dict[str, float] | None = None):
    folder.mkdir(parents=True)
    lines, index = [], 0
    for key, count in right.items():
        for n in range(10):
            score = float(n < count)
            lines.append(json.dumps({"index": index, "key": key, "score": score}))
            index += 1
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    if shares is not None:
        (folder / "shares.json").write_text(json.dumps(shares))


def test_every_arm_is_a_run_and_the_controls_match(tmp_path):
    jobs = hop_arms.jobs(tmp_path, [1, 2], list(hop_arms.ARMS), tmp_path / "data", 60)
    done = [job.done for job in jobs]
    assert len(set(done)) == len(done) == 1 + 2 * (6 + 3)
    metrics = [{"iteration": n, "moe/delegated_share": 0.2 if n > 18 else 1.0} for n in range(20)]
    for seed in (1, 2):
        like = tmp_path / f"seed{seed}" / "cascade"
        like.mkdir(parents=True)
        (like / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + "\n{}\n")
    for job, run in trained(jobs):
        arm, settings = job.done.parent.name, run.model.layers.get("C")
        assert (settings is not None) == (arm in ("cascade", "parallel", "random"))
        assert run.model.language.moe_router_topk == (4 if arm == "more_experts" else 2)
        assert run.training.train_iters == 60
        if settings is not None:
            assert (settings.delegate_input == "stream") == (arm == "parallel")
            share = settings.delegate_random_share
            # The last tenth of 20 steps: one of 1 and one of 0.2.
            assert share == (pytest.approx(0.6) if arm == "random" else None)


def test_the_table_by_hand(tmp_path):
    kinds = ("multihop", "spatial", "count", "count/free", "ocr")
    for seed, gain in ((1, 1), (2, 3)):
        plain = dict(zip(kinds, (2, 6, 3, 3, 9), strict=True))
        cascade = plain | {"multihop": 2 + gain}
        write_run(tmp_path / f"seed{seed}" / "plain", plain)
        shares = {"multihop": 0.4, "multihop/free": 0.2, "ocr": 0.1}
        write_run(tmp_path / f"seed{seed}" / "cascade", cascade, shares)
        (tmp_path / f"seed{seed}" / "cascade" / "metrics.jsonl").write_text(
            "".join(f'{{"moe/delegated_share": {share}}}\n' for share in [1.0] * 9 + [0.15])
        )
    found = hop_table.table(tmp_path)
    rows = {row["arm"]: row for row in found["arms"]}
    assert rows["plain"]["accuracy"] == pytest.approx(0.46)
    assert rows["cascade"]["multihop, at once"] == pytest.approx(0.4)
    assert rows["cascade"]["count"] == pytest.approx(0.3)
    assert rows["cascade"]["handed"] == pytest.approx({"multihop": 0.3, "ocr": 0.1})
    assert rows["plain"]["flops"] == 1.0 < rows["cascade"]["flops"] < 1.2
    (over,) = found["differences"]
    assert (over["over"], over["seeds"]) == ("plain", 2)
    assert over["multihop, at once"][0] == pytest.approx(0.2)
    assert over["accuracy over seeds"][0] == pytest.approx(0.04)
    assert over["multihop, at once over seeds"] is not None
    # What a step computes follows from all tokens, not from those of answers.
    assert rows["cascade"]["handed in training"] == pytest.approx(0.15)
    assert rows["cascade"]["flops"] == pytest.approx(hop_table.flops("cascade", 0.15))
    assert "seed1/parallel/answers.jsonl" in found["missing"]
    assert "seed1/deeper/shares.json" not in found["missing"]
    text = hop_table.markdown(found)
    assert "| `cascade` | 2 |" in text and "multihop 0.30, ocr 0.10" in text
    assert f"Missing: {len(found['missing'])} files" in text
    assert json.loads(json.dumps(found))["arms"] == found["arms"]


def test_a_second_hop_costs_what_it_hands_over():
    """Two of eight experts in every layer, twice as many as a token has."""
    none, half, full = (hop_table.flops("cascade", share) for share in (0.0, 0.5, 1.0))
    assert 1.0 < none < 1.01 and half - none == pytest.approx(full - half)
    assert full == pytest.approx(hop_table.flops("more_experts", None), rel=0.02)


def test_a_table_of_nothing_says_so(tmp_path, capsys):
    command = ["cascaded_experts", "--table", "--out", str(tmp_path)]
    assert compare_arms.main(command) == 0
    assert "| arm |" in capsys.readouterr().out
