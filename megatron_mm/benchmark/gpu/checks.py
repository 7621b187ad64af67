"""The checks, in order of value. A new one is a function in this folder and an entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """
    Attributes:
        what: a line for `--list`.
        part: `module.function` of this folder; called with a `Visit` and a `Row`.
        seconds: that it takes on a GPU; it is not begun with less time left, and ended after
            three times as long.
        on_cpu: `module.function` of this folder; a process without GPU calls it with `dry` and
            keeps what it returns for `Visit.from_cpu`.
        alone: whether it needs a process that has not computed anything yet.
    """

    name: str
    what: str
    part: str
    seconds: float
    on_cpu: str | None = None
    alone: bool = False


CHECKS = (
    Check("environment", "card, driver, packages; peaks that the planner assumes",
          "environment.check", 15),
    Check("gradients", "a training step against the CPU's, in fp32 and bf16",
          "gradients.check", 40, on_cpu="gradients.reference"),
    Check("delta_rule", "our delta rule against the CPU's, forward and gradients",
          "delta_rule.check", 20),
    Check("fla", "flash-linear-attention against our delta rule, in fp32 and bf16",
          "delta_rule.check_fla", 60),
    Check("experts", "routed experts against one by one, empty ones too",
          "experts.check", 30),
    Check("attention", "packed samples; what a new length costs, with cuDNN and without",
          "attention.check", 30),
    Check("slice", "layers of mm-80b at their widths: milliseconds, waits, kernels; the plan's",
          "slice.check", 90, on_cpu="plan.predicted"),
    Check("memory", "peak of a step of that slice against the planner's",
          "slice.check_memory", 15, on_cpu="plan.predicted"),
    Check("decoding", "a token at 16 and 128 rows: milliseconds, launches, waits",
          "decoding.check", 45),
    Check("training", "SFT with asynchronous saving, resumed bitwise; GRPO with replayed routes",
          "training.check", 60, alone=True),
    Check("te", "Transformer Engine's layers against ours", "te.check", 40),
)  # fmt: skip
