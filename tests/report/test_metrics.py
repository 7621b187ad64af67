"""MetricsLogger: one line per step on disk, no duplicates after a resume, no network."""

import io
import json
import sys
from datetime import date

import pytest

from megatron_mm import cli
from megatron_mm.config.settings import LoggingConfig
from megatron_mm.report import backwards
from megatron_mm.report.backwards import from_the_end
from megatron_mm.report.metrics_log import MetricsLogger, format_duration, read_metrics
from megatron_mm.report.page_rl import last_groups, last_rows


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quiet(path, **changes) -> LoggingConfig:
    settings = {"tensorboard": False, "wandb_mode": "disabled", **changes}
    return LoggingConfig(output_dir=str(path), **settings)


def test_one_line_per_step_is_on_disk_at_once(tmp_path):
    logger = MetricsLogger(quiet(tmp_path), {}, total_steps=2, stream=io.StringIO())
    logger.log(1, {"train/lm_loss": 2.5, "tokens": 5000.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"iteration": 1, "train/lm_loss": 2.5, "tokens": 5000}
    ]
    logger.close()
    logger.close()


def test_resume_drops_later_steps_and_a_half_written_line(tmp_path):
    with MetricsLogger(quiet(tmp_path), {}, total_steps=4, stream=io.StringIO()) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"train/lm_loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 4, "lm l')
    with MetricsLogger(quiet(tmp_path), {}, 4, start_step=2, stream=io.StringIO()) as logger:
        logger.log(3, {"train/lm_loss": 30.5})
    found = [(r["iteration"], r["train/lm_loss"]) for r in read_metrics(path)]
    assert found == [(1, 1), (2, 2), (3, 30.5)]


def test_fresh_run_replaces_an_old_record(tmp_path):
    for value in (1.5, 2.5):
        with MetricsLogger(quiet(tmp_path), {}, total_steps=1, stream=io.StringIO()) as logger:
            logger.log(1, {"train/lm_loss": value})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 1, "train/lm_loss": 2.5}]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
def test_records_are_found_from_the_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(backwards, "BLOCK", block)
    path = tmp_path / "completions.jsonl"
    assert [*from_the_end(path)] == []
    records = [{"iteration": n, "text": "x" * (n % 5) + "é\u2028"} for n in range(9)]
    lines = [json.dumps(record, ensure_ascii=n % 2 == 0) for n, record in enumerate(records)]
    whole = "\n".join([lines[0], "", *lines[1:]]) + "\n"  # a blank line is passed over
    for torn in ("", '{"iteration": 9, "te', "{}"):  # a line without an end is not whole
        path.write_text(whole + torn)
        found = [*from_the_end(path)]
        assert [record for _, record in found] == records[::-1]
        for end, record in found:
            assert json.loads(path.read_bytes()[:end].splitlines()[-1]) == record
    path.write_text(whole + "[]\n")
    with pytest.raises(ValueError, match="completions.jsonl: the line that ends at byte [0-9]+ is"):
        next(from_the_end(path))


def test_a_resumed_record_is_cut_without_reading_it_whole(tmp_path):
    """Completions of a long run have gigabytes."""
    path = tmp_path / "completions.jsonl"
    with MetricsLogger(quiet(tmp_path), {}, total_steps=9, stream=io.StringIO()) as logger:
        for step in range(1, 10):
            logger.table(step, [{"row": n, "completion": "x" * 10} for n in range(3)])
    path.write_bytes(b"not read\n" + path.read_bytes())
    before = path.stat().st_ino
    for step in (9, 7):  # nothing is dropped; two steps are
        with MetricsLogger(quiet(tmp_path), {}, 9, start_step=step, stream=io.StringIO()):
            pass
        lines = path.read_text().splitlines()
        assert len(lines) == 1 + step * 3 and json.loads(lines[-1])["iteration"] == step
        # A reader that follows the file must not find half a line in it.
        assert (path.stat().st_ino == before) == (step == 9)


def test_the_page_shows_the_last_rollouts_whole(tmp_path):
    path = tmp_path / "completions.jsonl"
    rows = [
        {"iteration": step, "row": n, "completion": f"{step} {n} {c}"}
        for step in range(1, 9)
        for n in range(3)
        for c in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_groups(last_rows(path)) == last_groups(rows)
    assert last_rows(path) == rows[-3 * 6 :]  # three groups a step, of which eight are shown


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_nan_stays_valid_json(tmp_path):
    stream = io.StringIO()
    with MetricsLogger(quiet(tmp_path), {}, total_steps=1, stream=stream) as logger:
        logger.log(1, {"train/lm_loss": float("nan")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"iteration": 1, "train/lm_loss": None}
    assert "train/lm_loss nan" in stream.getvalue()


def test_other_ranks_write_nothing(tmp_path):
    with MetricsLogger(LoggingConfig(str(tmp_path / "no")), {}, 1, enabled=False) as logger:
        logger.log(1, {"train/lm_loss": 1.0})
    assert not (tmp_path / "no").exists()


def test_plain_lines_follow_the_interval_and_show_evaluations(tmp_path):
    stream = io.StringIO()
    config = quiet(tmp_path, log_interval=2)
    with MetricsLogger(config, {}, total_steps=5, stream=stream) as logger:
        for step in range(1, 6):
            logger.log(step, {"train/lm_loss": 1.0})
        logger.log(3, {"accuracy/ocr": 0.5})
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"step {n}/5" for n in (2, 4, 5, 3)]
    assert "accuracy/ocr 50.0%" in lines[-1]


def test_terminal_gets_a_bar(tmp_path):
    stream = Terminal()
    with MetricsLogger(quiet(tmp_path), {}, 10, start_step=4, stream=stream) as logger:
        logger.log(10, {"train/lm_loss": 0.25})
    assert "10/10" in stream.getvalue() and "train/lm_loss 0.25" in stream.getvalue()


def test_tensorboard_gets_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = quiet(tmp_path, tensorboard=True)
    with MetricsLogger(config, {}, total_steps=1, stream=io.StringIO()) as logger:
        logger.log(1, {"train/lm_loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 0.5)]


def test_wandb_offline_stays_in_the_run_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "https://localhost:9")  # nothing listens there
    cli.setup_logging(0)
    config = quiet(tmp_path, wandb_mode="offline")
    with MetricsLogger(config, {"seed": 1}, total_steps=1, stream=io.StringIO()) as logger:
        logger.log(1, {"train/lm_loss": 0.5})
        logger.log(1, {"accuracy/ocr": 0.5})
    assert "warning" not in capsys.readouterr().err
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_that_fails_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb now fails
    cli.setup_logging(0)
    config = quiet(tmp_path, wandb_mode="offline")
    with MetricsLogger(config, {}, total_steps=1, stream=io.StringIO()) as logger:
        logger.log(1, {"train/lm_loss": 0.5})
    assert capsys.readouterr().err.count("warning: no W&B logging") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_records_of_earlier_runs_are_kept_and_named(tmp_path, capsys):
    """A run that dies before its first save begins again, and replaces nothing but itself."""
    cli.setup_logging(0)
    for loss in (1.0, 2.0, 3.0):
        with MetricsLogger(quiet(tmp_path), {}, total_steps=9, stream=io.StringIO()) as logger:
            logger.log(1, {"train/lm_loss": loss})
            logger.table(1, [{"completion": str(loss)}])
    for name, losses in {"": [3.0], ".previous": [1.0], ".previous2": [2.0]}.items():
        found = read_metrics(tmp_path / f"metrics.jsonl{name}")
        assert [record["train/lm_loss"] for record in found] == losses
        assert len(read_metrics(tmp_path / f"completions.jsonl{name}")) == 1
    said = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/metrics.jsonl of an earlier run is kept as metrics.jsonl.previous2" in said


def test_results_of_an_earlier_run_are_no_results_of_this_one(tmp_path):
    """The page would show its accuracies. A run that goes on keeps its own."""
    names = ("results.json", "evaluation.json", "answers.jsonl", "experts_before.json")
    for name in names:
        (tmp_path / name).write_text(name)
    for start, kept in ((0, True), (1, True), (0, False)):
        with MetricsLogger(quiet(tmp_path), {}, 9, start, stream=io.StringIO()) as logger:
            logger.log(start + 1, {"train/lm_loss": 1.0})
        assert [(tmp_path / name).exists() for name in names] == [kept] * 4
    assert [(tmp_path / f"{name}.previous").read_text() for name in names] == [*names]


def test_a_table_may_hold_what_json_cannot_say(tmp_path):
    row = {"truth": date(2026, 1, 2), "completion": "<7>"}
    with MetricsLogger(quiet(tmp_path), {}, total_steps=1, stream=io.StringIO()) as logger:
        logger.table(1, [row])
    assert read_metrics(tmp_path / "completions.jsonl") == [
        {"iteration": 1, "truth": "2026-01-02", "completion": "<7>"}
    ]


def test_durations():
    assert [format_duration(s) for s in (0, 63, 3723)] == ["0:00", "1:03", "1:02:03"]
