"""The short run: a few inputs of every reader, and that the harness sees what it should see."""

from __future__ import annotations

import pytest

from tests.hostile import fuzz

INPUTS = 60


@pytest.mark.launches
@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.names())
def test_a_short_run(name):
    counts, findings = fuzz.fuzz([name], seed=1, seconds=600, most=INPUTS)
    assert not findings, "\n".join(findings)
    assert sum(counts[name].values()) == INPUTS
    assert counts[name]["refused"] > 0


@pytest.mark.launches
@pytest.mark.slow
def test_the_harness_sees_harm(monkeypatch):
    """A reader that raises, writes beyond its folder, starts a program, ends and hangs."""
    monkeypatch.setattr(fuzz, "LIMIT", 3.0)
    counts, findings = fuzz.fuzz(["_harmful"], seed=1, seconds=600, most=7)
    assert counts["_harmful"] == {
        **{"accepted": 1, "refused": 1, "traceback": 1, "touched": 2, "ended": 1, "hang": 1}
    }
    assert len(findings) == 5 and all("--seed 1 --first" in line for line in findings)
