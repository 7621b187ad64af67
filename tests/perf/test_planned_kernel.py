"""A plan has the delta rule of the run, and says which terms of a loss it leaves out."""

from __future__ import annotations

import pytest

from megatron_mm.config import load
from megatron_mm.model.backends.choice import choose
from megatron_mm.model.layers.gdn.mix import convolve_and_scan
from megatron_mm.perf import table
from megatron_mm.perf.hardware import Assumptions, gpu
from megatron_mm.perf.layout import plan_layout
from megatron_mm.perf.standins import planned_backend

FLAGS = ["--preset", "tiny", "--seq-length", "128", "--global-batch-size", "2"]


@pytest.mark.parametrize(
    ("flags", "torchs"),
    [
        ([], False),
        (["--gdn-kernel", "torch"], True),
        (["--deterministic-mode"], True),
    ],
)
def test_the_kernel_of_a_plan(flags, torchs):
    run = load(argv=[*FLAGS, *flags])
    planned = planned_backend(run, "cuda", lambda **_: None)
    assert (planned.mix is convolve_and_scan) == torchs
    if torchs:
        assert choose(run.backend).mix is planned.mix


def test_terms_that_are_left_out_are_named():
    more = ["--mimic-kd-coeff", "0.5", "--mimic-routes", "routes.st"]
    more += ["--router-align-coeff", "0.4", "--skill-map", "map.json"]
    notes = []
    for flags in ([], more):
        run = load(argv=[*FLAGS, *flags])
        plan = plan_layout(run, 1, gpu("H100"), Assumptions())
        notes.append(
            [note for note in table.assumptions(plan, 1, 1.0) if "adds to the loss" in note]
        )
    assert notes == [
        [],
        ["what router_align_coeff, mimic_kd_coeff adds to the loss: not in the plan"],
    ]
