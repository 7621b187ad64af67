"""The comparison of answers that look: its jobs, and its table on runs by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.digits.jobs import ROOT
from examples.looking import arms, table
from megatron_mm.config import load
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from support.arms import trained


def test_the_jobs(tmp_path):
    jobs = arms.jobs(tmp_path, [1, 2], [*arms.ARMS], arms.Size(8, 40, iters=60, rl_iters=7))
    done = [job.done for job in jobs]
    assert len(set(done)) == len(done) == 1 + 2 * len(arms.ARMS)
    for job, run in trained(jobs):
        arm = arms.ARMS[job.done.parent.name]
        # Reinforcement has steps of its own: a thousand would be ten times what is asked for.
        assert run.training.train_iters == (60 if arm.begins is None else 7)
        assert run.training.objective == ("sft" if arm.begins is None else "grpo")
        if arm.begins is not None:
            assert Path(run.checkpoint.load).parent == job.done.parents[1] / arm.begins


def test_an_arm_brings_what_it_begins_with(tmp_path):
    jobs = arms.jobs(tmp_path, [1], ["grpo"], arms.Size())
    assert [job.done.parent.name for job in jobs[1:]] == ["boxes_tenth", "grpo"]


def write_run(folder: Path, right: int, looks: int) -> None:
    """Four questions of one kind, so many right, each answered "3" after so many looks."""
    folder.mkdir(parents=True)
    record = {"key": "ocr", "prediction": "3", "looked": [[0, 0, 1]] * looks}
    lines = [json.dumps(record | {"index": n, "score": float(n < right)}) for n in range(4)]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")


def test_the_table_by_hand(tmp_path, look_scenes):
    (tmp_path / "data").symlink_to(look_scenes)
    for seed in (1, 2):
        at = tmp_path / f"seed{seed}"
        write_run(at / "blind", 1, 0)
        write_run(at / "stream", 1, 0)
        write_run(at / "boxes_tenth", 2, 1)
        write_run(at / "boxes", 3, 1)
        write_run(at / "grpo", 2 + seed, 1)
    found = table.summary(tmp_path)
    rows = {row["arm"]: row for row in found["arms"]}
    assert rows["boxes"]["accuracy"] == 0.75 and rows["boxes"]["seeds"] == 2
    spoken = rows["blind"]["answer_tokens"]
    assert rows["boxes"]["answer_tokens"] == spoken + table.SLOTS
    assert (rows["blind"]["image_tokens"], rows["stream"]["image_tokens"]) == (4, 100)
    # The stream of all tiles costs more than glimpses of the same tiles.
    assert rows["blind"]["flops"] < rows["boxes"]["flops"] < rows["stream"]["flops"]
    over = {(row["arm"], row["over"]): row for row in found["differences"]}
    assert over["boxes", "blind"]["accuracy"][0] == pytest.approx(0.5)
    assert over["grpo", "boxes_tenth"]["accuracy"][0] == pytest.approx(0.375)
    assert over["grpo", "boxes_tenth"]["between seeds"][0] == pytest.approx(0.375)
    assert ("tokens", "boxes") not in over  # one of them is missing
    assert "seed1/tokens/answers.jsonl" in found["missing"]
    text = table.markdown(found)
    assert "| over | `boxes_tenth` | `boxes` | `grpo` |" in text and "Missing: 18 files" in text
    # Of the questions 0, 0, 1 and 0.5 are gained: 1.96 standard errors of a deviation of 0.479. Of
    # the seeds 0.25 and 0.5: 12.7 of 0.125.
    assert "\n| `boxes_tenth` |  |  | +0.375 ± 0.469 / 1.588 |" in text


def test_a_prompts_tokens_are_those_of_training(tmp_path, look_scenes):
    (tmp_path / "data").symlink_to(look_scenes)
    run = load(str(arms.HERE / "looking.yaml"), [])
    run.data.tokenizer_model = str(look_scenes / "tokenizer.model")
    builder = SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))
    rows = Rows(look_scenes / "valid.jsonl")
    samples = [builder.prompt(rows[n], rows.where(n), rows.folder) for n in range(len(rows))]
    prompts = [len(sample.tokens_T) - table.TILE for sample in samples]
    assert table._prompt(tmp_path / "data") == pytest.approx(sum(prompts) / len(prompts))


def test_the_readme_shows_the_table_of_the_kept_seeds():
    """Each seed's scores are in the repository, so the table can be made again."""
    kept = ROOT / "examples" / "benchmarks" / "seeds" / "looking"
    found = table.summary(kept)
    shown = (arms.HERE / "README.md").read_text()
    assert found["arms"] and table.markdown({**found, "missing": []}) in shown
