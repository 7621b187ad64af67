"""Jobs of the comparison of memories: what a look may see, and what GRPO adds to each.

For every memory and seed one model is trained as in the demo, on its scenes. Each arm continues
from it. `sft_continued` trains for as long as `grpo` of the same
memory and seed, so keep the load of the machine even.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from examples.digits.jobs import DIGITS, Job, digits_data, training

ARMS = ("grpo", "sft_continued")
# The demo's memory of the looks, and three controls: keys without position, a memory no richer than
# the stream, and another scene in the memory.
MEMORIES = {
    "clvr": (),
    "none": ("--vision-memory", "none"),
    "no_coordinates": ("--no-memory-coordinates",),
    "thumbnail": ("--vision-memory", "thumbnail"),
    "another": ("--memory-images", "other_images"),
}


def jobs(
    out: Path,
    memories: Sequence[str],
    seeds: Sequence[int],
    arms: Sequence[str],
    data: Path,
    sft_iters: int | None = None,
    rl_iters: int | None = None,
) -> list[Job]:
    """Returns the jobs, in their order. `out`/memory/seedN/arm is the folder of a run.

    Args:
        data: where the demo's scenes are, or will be made.
        sft_iters, rl_iters: steps, in place of the configs'.
    """
    made = [digits_data(data, ())]
    files = ["--valid-data", str(data / "valid.jsonl")]
    files += ["--tokenizer-model", str(data / "tokenizer.model")]
    for memory in memories:
        for seed in seeds:
            folder = out / memory / f"seed{seed}"
            base, given = folder / "sft", [*MEMORIES[memory], "--seed", str(seed), *files]
            iters = [] if sft_iters is None else ["--train-iters", str(sft_iters)]
            rows = [f"{data}/align.jsonl:19200", f"{data}/mix.jsonl"]
            flags = [*given, "--train-data", *rows, *iters]
            made.append(training(DIGITS / "demo.yaml", base, flags, [made[0].done]))
            given += ["--load", str(base / "checkpoint"), "--train-data", f"{data}/rl.jsonl"]
            iters = [] if rl_iters is None else ["--train-iters", str(rl_iters)]
            for arm in (name for name in ARMS if name in arms):
                run, config = folder / arm, DIGITS / "arms" / f"{arm}.yaml"
                needs, grpo = [base / "answers.jsonl"], folder / "grpo"
                if arm == "sft_continued":
                    needs.append(grpo / "answers.jsonl")
                    made.append(training(config, run, given, needs, partial(minutes_of, grpo)))
                else:
                    made.append(training(config, run, [*given, *iters], needs))
    return made


def minutes_of(folder: Path) -> float:
    """Returns how long a finished run has trained."""
    return json.loads((folder / "results.json").read_text())["seconds"] / 60
