"""Jobs of the comparison of ways to give skills experts of their own, and to reinforce a skill.

`out`/seedN holds, for each seed:

    base/            SFT as in the demo
    map.json         its experts by knock-out; the controls' maps: lift.json, shuffled.json and
                     shuffled_2.json, shuffled_3.json, which are shuffled otherwise
    sft/ARM/         400 more steps of SFT: plain, or with the alignment term and a map
    one/ARM/         from there 100 steps of GRPO on one kind of question, `ONE`
    all/ARM/         the same on all questions in any form

Each run ends with answers to all held-out questions (answers.jsonl), and is measured: experts.json
(routes into the clusters, removal of each cluster) and measures.json (accuracy of a task with few
experts kept, and out of distribution). The jobs come in tiers, of which the first tells most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.digits.jobs import DIGITS, Job, digits_data, discovery, training

ONE = "multihop/free"  # the kind that is reinforced alone
ASKED = 40  # questions of each kind for the test by removal, asked once per skill
PROBED = 400  # rows that a probe reads: one more pass each for every expert of every layer
LONGEST_WARMUP = 50  # of the configs, in steps
TIERS = (1, 2, 3)


@dataclass(frozen=True)
class Model:
    """A model and its scenes.

    Attributes:
        flags: of the model, where it differs from the demo's.
        scenes: flags of make_digits.
        kinds: of questions.
        reading: samples of the base's SFT that only read.
        steps: of the base's SFT, where they differ from the demo's.
    """

    flags: tuple[str, ...]
    scenes: tuple[str, ...]
    kinds: int
    reading: int = 19200  # as in the demo
    steps: int | None = None


MODELS = {
    "tiny": Model((), (), 16),
    # Four small experts of 32 do the work of two of 8.
    "wide": Model(
        (
            *("--num-experts", "32", "--moe-router-topk", "4", "--moe-ffn-hidden-size", "32"),
            *("--vocab-size", "448"),
        ),
        ("--scenes", "wide", "--rl-per-image", "4"),
        23,
        # Digits are read late: after 800 steps of reading and 3,000 in all, ocr was at 23 %.
        64000,
        6000,
    ),
}


@dataclass(frozen=True)
class Arm:
    """A way to go on.

    Attributes:
        config: in arms/.
        start: the folder it starts from, beside the seed's.
        map: the skill map it uses; None: none, and it is measured with `map.json`.
        tier: 1 tells most.
        flags: what the config leaves open.
        aligned: whether its routes know clusters. If not, few experts are kept by use alone.
    """

    config: str
    start: str
    map: str | None
    tier: int
    flags: tuple[str, ...] = ()
    aligned: bool = True

    @property
    def measured_with(self) -> str:
        return self.map or "map"


SFT = {
    "plain": Arm("sft_more", "base", None, 1, aligned=False),
    "aligned": Arm("align", "base", "map", 1),
    "shuffled": Arm("align", "base", "shuffled", 1),
    "lift": Arm("align", "base", "lift", 3),
    "shuffled_2": Arm("align", "base", "shuffled_2", 3),
    "shuffled_3": Arm("align", "base", "shuffled_3", 3),
    "zero": Arm("align", "base", "map", 3, ("--router-align-coeff", "0"), aligned=False),
}
# Starting points differ: those that are not aligned have had as many steps of SFT.
RL = {
    "grpo": Arm("grpo", "sft/plain", None, 1, aligned=False),
    "experts": Arm("grpo_experts", "sft/plain", None, 1, aligned=False),
    "scope": Arm("grpo_scope", "sft/aligned", "map", 1),
    "shuffled_scope": Arm("grpo_scope", "sft/shuffled", "shuffled", 1),
    "kl": Arm("grpo_kl", "sft/plain", None, 2, aligned=False),
    "aligned": Arm("grpo_experts", "sft/aligned", None, 2),
    "lora": Arm("grpo_lora", "sft/plain", None, 2, aligned=False),
    "shuffled_2_scope": Arm("grpo_scope", "sft/shuffled_2", "shuffled_2", 3),
    "shuffled_3_scope": Arm("grpo_scope", "sft/shuffled_3", "shuffled_3", 3),
}


@dataclass(frozen=True)
class Size:
    """Steps and questions: those of the comparison, or fewer to try it out; None: the configs'."""

    questions: int = 2000  # of each kind
    images: int = 6000
    base_iters: int | None = None
    sft_iters: int | None = None
    rl_iters: int | None = None


def arms() -> dict[str, Arm]:
    """Returns every arm by its folder beside the seed's."""
    found = {f"sft/{name}": arm for name, arm in SFT.items()}
    found |= {f"one/{name}": arm for name, arm in RL.items()}
    return found | {f"all/{name}": arm for name, arm in RL.items() if arm.tier < TIERS[-1]}


def jobs(
    out: Path, model: Model, seeds: Sequence[int], tiers: Sequence[int], size: Size
) -> list[Job]:
    """Returns the jobs of a model in their order: the most telling of each seed first, then what
    RL on all questions does, then the rest.

    Args:
        out: the model's folder.
    """
    data = out / "data"
    counts: tuple[str, ...] = ("--images", str(size.images))
    counts += ("--valid-images", str(max(30, size.questions)))
    counts += ("--valid-per-key", str(size.questions), "--beyond", str(max(1, size.questions // 4)))
    made = [digits_data(data, (*model.scenes, *counts, "--one", ONE))]
    for tier in tiers:
        for seed in seeds:
            made += _of_seed(out / f"seed{seed}", data, model, seed, tier, size)
    return list({job.done: job for job in made}.values())


def tier_of(where: str, arm: Arm) -> int:
    """Returns the tier of an arm: reinforcing all questions is one later than reinforcing one."""
    return arm.tier + where.startswith("all/")


def _of_seed(folder: Path, data: Path, model: Model, seed: int, tier: int, size: Size) -> list[Job]:
    files = ["--valid-data", str(data / "valid.jsonl"), "--eval-batch-size", "512"]
    files += ["--tokenizer-model", str(data / "tokenizer.model"), "--seed", str(seed)]
    given = [*model.flags, *files]
    base = folder / "base"
    rows = [f"{data}/align.jsonl:{model.reading}", f"{data}/mix.jsonl"]
    steps = _steps(size.base_iters or model.steps)
    made = [
        training(
            DIGITS / "demo.yaml",
            base,
            [*given, "--train-data", *rows, *steps],
            [data / "tokenizer.model"],
        ),
        *_maps(folder, data, seed),
    ]
    chosen = {name: arm for name, arm in arms().items() if tier_of(name, arm) == tier}
    for name, arm in chosen.items():
        made.append(_run(folder, name, arm, data, given, size))
    for name, arm in chosen.items():
        made += _measured(folder / name, folder, arm, data, model)
    return made


def _steps(count: int | None) -> list[str]:
    if count is None:
        return []
    few = count <= LONGEST_WARMUP
    return ["--train-iters", str(count), *(("--lr-warmup-iters", "0") if few else ())]


def _maps(folder: Path, data: Path, seed: int) -> list[Job]:
    """The skill map of the base, and those of the controls."""
    base, found = folder / "base", folder / "map.json"
    flags = ["--samples", str(PROBED)]
    made = [discovery(base / "checkpoint", data, found, flags, [base / "answers.jsonl"])]
    controls = {"shuffled": seed, "lift": seed, "shuffled_2": seed + 100, "shuffled_3": seed + 200}
    for name, drawn in controls.items():
        target = folder / f"{name}.json"
        given = ("--map", str(found), "--seed", str(drawn))
        kind = f"--{name.partition('_')[0]}"
        command = ("-m", "examples.digits.control_maps", *given, kind, str(target))
        made.append(Job(target, command, target.with_suffix(".log"), (found,)))
    return made


def _run(folder: Path, name: str, arm: Arm, data: Path, given: Sequence[str], size: Size) -> Job:
    what = name.partition("/")[0]
    rows = {"sft": "mix", "one": "rl_one", "all": "rl"}[what]
    start = folder / arm.start
    flags = [*given, "--load", str(start / "checkpoint"), "--train-data", f"{data}/{rows}.jsonl"]
    needs = [start / "answers.jsonl"]
    if arm.map is not None:
        skill_map = folder / f"{arm.map}.json"
        flags += ["--skill-map", str(skill_map)]
        needs.append(skill_map)
    if arm.config == "grpo_kl":
        flags += ["--ref-load", str(start / "checkpoint")]
    flags += [*arm.flags, *_steps(size.sft_iters if what == "sft" else size.rl_iters)]
    return training(DIGITS / "arms" / f"{arm.config}.yaml", folder / name, flags, needs)


def _measured(run: Path, folder: Path, arm: Arm, data: Path, model: Model) -> list[Job]:
    skill_map = folder / f"{arm.measured_with}.json"
    needs = [run / "answers.jsonl", skill_map]
    flags = ["--skill-map", str(skill_map), "--selectivity", str(data / "valid.jsonl")]
    flags += ["--samples", str(PROBED), "--eval-samples", str(ASKED * model.kinds)]
    flags += ["--eval-batch-size", "512"]
    measures = run / "measures.json"
    command: tuple[str, ...] = ("-m", "examples.digits.measure", "--run", str(run))
    command += ("--skill-map", str(skill_map), "--data", str(data))
    if not arm.aligned:
        command += ("--by-use",)
    return [
        discovery(run / "checkpoint", data, run / "experts.json", flags, needs),
        Job(measures, command, measures.with_suffix(".log"), tuple(needs)),
    ]
