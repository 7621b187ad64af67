"""Jobs of the comparison of cascaded experts (letter C) with their controls.

Every arm and seed is one model, trained from the start as in the demo and on its scenes; its
answers, and of an arm with a second hop the share of tokens handed over by kind of question, are
what the table is made of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.digits.jobs import AT_ONCE, DIGITS, Job, digits_data, training

PLAIN, CASCADE = "GE*ELJGE*E", "GC*CLJGC*C"
LAST = 0.1  # share of a run's steps over which its share of tokens handed over is taken
SHARES = "shares.json"


@dataclass(frozen=True)
class Arm:
    """
    Attributes:
        pattern: letters of its layers.
        flags: what else differs from the demo.
        matched: it hands over by chance, as many as `cascade` of its seed does in the end.
    """

    pattern: str
    flags: tuple[str, ...] = ()
    matched: bool = False

    @property
    def config(self) -> Path:
        """The demo's settings, with those of letter C where there is one."""
        return DIGITS / ("cascaded_experts.yaml" if "C" in self.pattern else "demo.yaml")


ARMS = {
    "plain": Arm(PLAIN),
    "cascade": Arm(CASCADE),
    # The second hop reads what the first read: two hops side by side.
    "parallel": Arm(CASCADE, ("--delegate-input", "stream")),
    # The experts of both hops in one.
    "more_experts": Arm(PLAIN, ("--moe-router-topk", "4")),
    # No choice of who is handed over, and no price for it.
    "random": Arm(CASCADE, ("--delegate-price", "0"), matched=True),
    # A layer more for everyone.
    "deeper": Arm(PLAIN + "GE"),
}


def jobs(
    out: Path, seeds: Sequence[int], arms: Sequence[str], data: Path, iters: int | None = None
) -> list[Job]:
    """Returns the jobs, in their order. `out`/seedN/arm is the folder of a run.

    Args:
        data: where the demo's scenes are, or will be made.
        iters: steps of every run, in place of the demo's.
    """
    made = [digits_data(data, ())]
    files = ["--valid-data", str(data / "valid.jsonl")]
    files += ["--tokenizer-model", str(data / "tokenizer.model")]
    files += ["--train-data", f"{data}/align.jsonl:19200", f"{data}/mix.jsonl"]
    steps = [] if iters is None else ["--train-iters", str(iters)]
    for seed in seeds:
        for name in (name for name in ARMS if name in arms):
            arm, run = ARMS[name], out / f"seed{seed}" / name
            needs, like = [made[0].done], out / f"seed{seed}" / "cascade"
            if arm.matched:
                needs.append(like / "answers.jsonl")
            flags = [*arm.flags, "--seed", str(seed), *files, *steps, *AT_ONCE]

            def late(arm: Arm = arm, like: Path = like) -> Sequence[str]:
                return ("--delegate-random-share", f"{share_of(like):.4f}") if arm.matched else ()

            made.append(training(arm.config, run, flags, needs, layers=arm.pattern, late=late))
            if "C" in arm.pattern:
                measured = ("--run", str(run), "--data", str(data / "valid.jsonl"))
                command = ("-m", "examples.digits.hop_shares", *measured)
                shares = run / SHARES
                done = (run / "answers.jsonl",)
                made.append(Job(shares, command, shares.with_suffix(".log"), done))
    return made


def share_of(run: Path) -> float:
    """Returns the share of tokens that a finished run handed over in its last steps."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line).get("moe/delegated_share") for line in lines]
    known = [share for share in found if share is not None]
    last = known[-max(1, round(LAST * len(known))) :]
    return sum(last) / len(last)
