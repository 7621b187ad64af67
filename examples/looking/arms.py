"""Jobs of the comparison of answers that look (active vision, letters Q and V) with their controls.

Every arm and seed is one model, trained from the start on 5x5 scenes of which the stream holds a
thumbnail of four tokens; `grpo` begins at an arm that has seen boxes in every tenth row, and
`tokens_grpo` at one that writes places as words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.digits.jobs import ROOT, Job, digits_data, training

HERE = ROOT / "examples" / "looking"
PLAIN, GLIMPSE = "GE*EGE*E", "GE*EQVGE*E"
BOXES = ("--query-box-loss-coeff", "1")
NOTHING = ("--vision-memory", "none")
WORDS = ("--query-place", "tokens")


@dataclass(frozen=True)
class Arm:
    """
    Attributes:
        pattern: letters of its layers.
        rows: the kind of its rows: answers that look, with boxes or in every tenth row ("_tenth"),
            or the same answers without looks ("_plain").
        flags: what else differs from looking.yaml.
        begins: the arm whose model it starts from.
        control: what it says about `boxes` or `hidden` if it is as good.
    """

    pattern: str = GLIMPSE
    rows: str = ""
    flags: tuple[str, ...] = ()
    begins: str | None = None
    control: str = ""

    @property
    def config(self) -> Path:
        return HERE / ("looking.yaml" if self.begins is None else "grpo.yaml")


ARMS = {
    "blind": Arm(PLAIN, "_plain", NOTHING, control="the summary is enough"),
    "clvr": Arm("GE*ELJGE*E", "_plain", ("--vision-memory", "tiles")),
    "stream": Arm(PLAIN, "_plain", (*NOTHING, "--image-stream", "tiles")),
    "hidden": Arm(),
    "boxes_tenth": Arm(rows="_tenth", flags=BOXES),
    "boxes": Arm(flags=BOXES),
    "grpo": Arm(begins="boxes_tenth"),
    "tokens": Arm(flags=WORDS),
    "tokens_grpo": Arm(begins="tokens", flags=WORDS),
    "words": Arm(PLAIN, flags=NOTHING, control="the format is enough"),
    "zero": Arm(flags=("--freeze-avm",), control="the slots' computation is enough"),
    "another": Arm(flags=(*BOXES, "--memory-images", "other_images"), control="it does not look"),
    "random": Arm(flags=("--query-place", "random"), control="any place is enough"),
    "oracle": Arm(flags=("--query-place", "oracle"), control="the most that places can give"),
}


@dataclass(frozen=True)
class Size:
    """
    Attributes:
        questions: of each of the four kinds, held out.
        images: for training.
        iters, rl_iters: steps of tuning and of reinforcement; None: the configs'.
    """

    questions: int = 500
    images: int = 3000
    iters: int | None = None
    rl_iters: int | None = None

    def steps(self, arm: Arm) -> list[str]:
        """Returns the flags of an arm's steps."""
        count = self.iters if arm.begins is None else self.rl_iters
        return [] if count is None else ["--train-iters", str(count)]


def jobs(out: Path, seeds: Sequence[int], arms: Sequence[str], size: Size) -> list[Job]:
    """Returns the jobs, in their order. `out`/seedN/arm is the folder of a run."""
    data = out / "data"
    flags = ["--scenes", "looking", "--grid", "5", "--images", str(size.images)]
    flags += ["--valid-per-key", str(size.questions)]
    made = [digits_data(data, flags)]
    files = ["--valid-data", str(data / "valid.jsonl")]
    files += ["--tokenizer-model", str(data / "tokenizer.model")]
    wanted = {*arms, *(begins for name in arms if (begins := ARMS[name].begins))}
    for seed in seeds:
        for name in (name for name in ARMS if name in wanted):
            arm, run = ARMS[name], out / f"seed{seed}" / name
            given = [*arm.flags, "--seed", str(seed), *files, *size.steps(arm)]
            needs = [made[0].done]
            if arm.begins is None:
                align, mix = (data / f"{part}{arm.rows}.jsonl" for part in ("align", "mix"))
                given += ["--train-data", f"{align}:19200", str(mix)]
            else:
                before = run.parent / arm.begins
                needs.append(before / "answers.jsonl")
                given += ["--load", str(before / "checkpoint")]
                given += ["--train-data", str(data / "rl.jsonl")]
            made.append(training(arm.config, run, given, needs, layers=arm.pattern))
    return made
