"""Log lines, exit codes and flags that the commands share."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm import cli, platform
from megatron_mm.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored():
    """The package's logger as it was, for the tests that follow in this process."""
    logger = cli.logger
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


def lines_of(rank: int, capsys) -> list[str]:
    cli.setup_logging(rank)
    logger = logging.getLogger("megatron_mm.train.loop")
    logger.debug("detail")
    logger.info("step %d", 3)
    logger.warning("no report")
    logger.info("left out: row 4", extra=cli.EVERY_RANK)
    logger.error("this rank alone")
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()


def test_rank_0_says_everything_and_others_what_rank_0_cannot_know(capsys):
    assert lines_of(0, capsys) == [
        "step 3",
        "warning: no report",
        "left out: row 4",
        "error: this rank alone",
    ]
    assert lines_of(1, capsys) == ["left out: row 4", "error: this rank alone"]


def test_setting_up_twice_does_not_say_it_twice(capsys):
    cli.setup_logging(0)
    assert len(lines_of(0, capsys)) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_every_rank_is_one_line_of_rank_0(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", str(rank))
    cli.setup_logging(cli.rank())
    assert cli.fail(ConfigError("lr is 0")) == 2
    assert cli.fail(CheckpointError("gone: 50% of it")) == 1
    said = capsys.readouterr().err
    assert said == ("error: lr is 0\nerror: gone: 50% of it\n" if rank == 0 else "")


@pytest.mark.parametrize("rank", [0, 1])
def test_before_the_ranks_have_joined_each_may_be_the_only_one(monkeypatch, capsys, rank):
    """Rank 0 speaks first: torchrun ends the others before they repeat it."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    cli.setup_logging(cli.rank())
    assert cli.fail(CheckpointError("gone"), joined=False) == 1
    said = capsys.readouterr().err
    assert (said, waited) == (
        ("error: gone\n", []) if rank == 0 else ("error: rank 1: gone\n", [cli.PATIENCE])
    )


def test_wrong_flags_are_a_config_error():
    parser = cli.Parser("A command.")
    parser.add_argument("--out", required=True)
    with pytest.raises(ConfigError, match="--out"):
        parser.parse_args([])
    assert cli.flag("max_new_tokens") == "--max-new-tokens"


def test_it_imports_no_torch():
    code = "import sys, megatron_mm.cli; print([m for m in sys.modules if m.startswith('torch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


class Hidden(Exception):
    """Raised in the place of hiding GPUs."""


class Installed(Exception):
    """Raised in the place of the redirects."""


@pytest.mark.parametrize(
    ("module", "arguments", "first"),
    [
        ("megatron_mm.perf.command", ["--world-size", "1"], Hidden),
        ("megatron_mm.perf.command", ["search", "--world-size", "1"], Hidden),
        ("megatron_mm.convert.commands.hf_to_megatron", [], Hidden),
        ("megatron_mm.convert.commands.megatron_to_hf", [], Hidden),
        ("megatron_mm.convert.commands.check_parity", [], Hidden),
        ("megatron_mm.benchmark.command", ["train", "--against", "transformers"], Hidden),
        ("megatron_mm.benchmark.command", ["rl", "--against", "transformers"], Hidden),
        *(
            ("megatron_mm.benchmark.command", [name], Hidden)
            for name in ("gdn", "clvr", "convert", "scaling")
        ),
        ("megatron_mm.benchmark.command", ["train", "--config", "x"], Installed),
        ("megatron_mm.benchmark.command", ["rl", "--config", "x"], Installed),
        ("megatron_mm.earl.command", ["--checkpoint", "x"], Installed),
        ("megatron_mm.checkpoint.merge_command", ["--checkpoint", "x"], Installed),
    ],
)
def test_commands_that_work_on_the_cpu_hide_gpus_first(monkeypatch, module, arguments, first):
    """Those that never move what they compare or plan to a GPU, and no others."""

    def raising(kind):
        def instead():
            raise kind

        return instead

    monkeypatch.setattr(platform, "hide_gpus", raising(Hidden))
    monkeypatch.setattr(platform, "install", raising(Installed))
    with pytest.raises(first):
        importlib.import_module(module).main(arguments)
