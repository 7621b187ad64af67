"""Text of rows, skills, rewards and files reaches a terminal without commanding it."""

from __future__ import annotations

import ast
import io
import logging
from pathlib import Path

import pytest

from megatron_mm import cli
from megatron_mm.config import LoggingConfig
from megatron_mm.errors import ConfigError
from megatron_mm.report.metrics_log import MetricsLogger

PACKAGE = Path(cli.__file__).parent
COMMANDS = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "C1": "\x9b31m",
    "return": "loss 1.0\rloss 0.0",
    "backspace": "bad\b\b\bgood",
    "delete": "a\x7fb",
    "bell": "\a",
    "form feed": "a\fb\vb",
    "right to left": "a\u202etxt.exe",
    "isolate": "a\u2066b\u2069",
    "zero width": "a\u200bb\ufeff",
    "line separator": "a\u2028error: forged",
    "half a pair": "a\ud800b",
    "NUL": "a\0b",
    "tags": "a\U000e0041b",
}


def _harmless(text: str) -> bool:
    return all(c in "\n\t" or c.isprintable() for c in text)


@pytest.mark.parametrize("kind", COMMANDS)
def test_commands_are_spelled(kind, capsys):
    given = COMMANDS[kind]
    assert not _harmless(given)
    assert _harmless(cli.printable(given))
    cli.setup_logging(0)
    logging.getLogger("megatron_mm.some").info("skill %s", given)
    cli.fail(ConfigError(f"rows.jsonl:3: skill {given}"))
    cli.say(f"| {given} |")
    out, err = capsys.readouterr()
    assert _harmless(out) and _harmless(err) and err.count("\n") == 2
    assert "rows.jsonl:3: skill" in err


def test_what_people_write_stays():
    text = "naïve 日本語 👍 — α ≤ β\n\t| 3.5 |"
    assert cli.printable(text) == text


def test_a_line_break_begins_no_line_of_ours(capsys):
    cli.setup_logging(0)
    logging.getLogger("megatron_mm.some").warning("a reward said x\nerror: forged")
    assert capsys.readouterr().err == "warning: a reward said x\n  error: forged\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, _Terminal])
def test_the_line_of_a_step_and_the_bar(stream, tmp_path):
    """A skill's name is part of a metric's."""
    shown = stream()
    settings = LoggingConfig(tensorboard=False, wandb_mode="disabled", output_dir=str(tmp_path))
    log = MetricsLogger(settings, {}, total_steps=2, stream=shown)
    log.log(1, {"loss": 1.0, "accuracy/\x1b]0;owned\x07": 0.5})
    log.close()
    assert "owned" in shown.getvalue() or stream is _Terminal
    assert "\x07" not in shown.getvalue() and "\x1b]" not in shown.getvalue()


def test_everything_is_printed_by_one_helper():
    """The page of settings is our own text, and an export's processor prints nothing."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print":
                found.append(str(path.relative_to(PACKAGE)))
    assert sorted(found) == ["cli.py", "config/reference.py"]
