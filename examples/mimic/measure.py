"""Measure a run of `arms.py` beyond its last answers: on the way, and without experts.

    python -m examples.mimic.measure --run runs/arms/mimic/seed1/scratch/mimic \\
        --map runs/arms/mimic/seed1/scratch/mimic/own.st --routes runs/arms/mimic/routes.st \\
        --skills runs/arms/mimic/skills.json --data runs/arms/mimic/data

At 10, 25, 35 and 50 % of its steps some questions are asked, and between these checkpoints and the
last one the share of routes that changed is counted, over the answers of probed rows. The last one
is asked without the experts that stand, by a map to what it has become, for each cluster of the
teacher's: if what breaks is what breaks in the teacher, the student works alike. Figures go into
points.json; the other checkpoints are deleted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.outputs import whole_file

SHARES = (10, 25, 35, 50, 100)  # per cent of the steps
PROBED = 300  # rows of which routes are compared
ON_THE_WAY, ASKED, KINDS = 100, 60, 16  # questions of each kind: before the end, without experts
RENAMED = 7  # most skills of which all orders are tried


def at_shares(folder: Path) -> dict[int, Path]:
    """Returns the checkpoints of a run by the share of its steps.

    Raises:
        SystemExit: one is missing.
    """
    found = {int(path.name.removeprefix("iter_")): path for path in folder.glob("iter_*")}
    last = max(found, default=0)
    wanted = {share: found.get(last * share // 100) for share in SHARES}
    lacking = [share for share, path in wanted.items() if path is None]
    if lacking:
        raise SystemExit(f"error: {folder}: no checkpoint at {lacking[0]} % of {last} steps")
    return {share: path for share, path in wanted.items() if path is not None}


def image_of(skills: Any, mapped: Any, num_experts: int, layers: int, topk: int) -> Any:
    """Returns a student's skill map: in each mapped layer the experts that have at least half of
    all that they are dealt from a teacher's cluster; if there are none, the one with the most.

    Args:
        skills: the teacher's SkillMap; mapped: an ExpertMap.
    """
    from megatron_mm.earl.skill_map import SkillMap

    found: dict[str, list[list[int]]] = {}
    for skill, clusters in skills.skills.items():
        found[skill] = [[] for _ in range(layers)]
        for mine, theirs in mapped.layers.items():
            cluster, a_TS = clusters[theirs], mapped.experts[mine]
            if cluster:
                share_S = a_TS[cluster].sum(0) / a_TS.sum(0).clamp(min=1e-9)
                most = (share_S >= 0.5).nonzero().flatten().tolist()
                found[skill][mine] = most or [int(share_S.argmax())]
    return SkillMap(layers, num_experts, topk, found)


def falls(causal: dict[str, Any], skills: Sequence[str]) -> np.ndarray:
    """Returns how far each skill's accuracy (columns) falls without each skill's cluster (rows),
    beyond how far it falls on average, and how much that cluster breaks on average. Without that,
    any two models would be alike: what is at chance cannot fall in either."""
    accuracy, without = causal["accuracy"], causal["without"]
    fall = np.array([[accuracy[skill] - without[of][skill] for skill in skills] for of in skills])
    return fall - fall.mean(0, keepdims=True) - fall.mean(1, keepdims=True) + fall.mean()


def alike(teacher: dict[str, Any], student: dict[str, Any]) -> tuple[float, float] | None:
    """Returns the correlation of what breaks in both, and the share of orders of the student's
    clusters for which it is as high. None if nothing breaks in one of them, or of less than three
    skills."""
    skills = sorted(teacher["without"].keys() & student["without"].keys())
    if len(skills) < 3:
        return None
    theirs, ours = falls(teacher, skills), falls(student, skills)
    size = np.linalg.norm(theirs) * np.linalg.norm(ours)
    if size < 1e-9:
        return None
    orders = [*itertools.permutations(range(len(skills)))] if len(skills) <= RENAMED else []
    if not orders:
        draw = np.random.default_rng(0)
        drawn = (tuple(draw.permutation(len(skills)).tolist()) for _ in range(5000))
        orders = [tuple(range(len(skills))), *drawn]
    found = [float((theirs * ours[list(order)]).sum() / size) for order in orders]
    return found[0], float(np.mean(np.array(found) >= found[0] - 1e-9))


def flipped(before: dict, after: dict) -> float:
    """Returns the share of (position, layer, place) whose expert is none of those before."""
    changed = total = 0
    for place, one in before.items():
        kept = (after[place].experts.unsqueeze(3) == one.experts.unsqueeze(2)).any(3)
        changed, total = changed + int((~kept).sum()), total + kept.numel()
    return changed / total


class Measured:
    """A run's model at any of its checkpoints."""

    def __init__(self, engine: Any, tokenizer: Any, data: Path) -> None:
        self.engine, self.tokenizer, self.data = engine, tokenizer, data

    def load(self, checkpoint: Path) -> None:
        from megatron_mm.checkpoint import sharded

        sharded.load(self.engine, checkpoint, finetune=True)

    def answers(self) -> dict[str, dict[int, float]]:
        """Returns the score of each of the first questions, by kind."""
        from examples.digits.measure import Measured as Asking
        from examples.digits.measure import first_of_each
        from megatron_mm.evaluation.evaluate import open_questions

        _, keys = open_questions(self.engine, self.tokenizer)
        first = first_of_each(keys, ON_THE_WAY)
        chosen = sorted(index for indices in first.values() for index in indices)
        found: dict[str, dict[int, float]] = {}
        for record in Asking(self.engine, self.tokenizer, self.data).ask("valid", chosen=chosen):
            found.setdefault(record["key"], {})[record["index"]] = record["score"]
        return found

    def routes(self) -> dict:
        """Returns the experts that the tokens of probed rows take, as `mimic.record` has them."""
        from megatron_mm.config import hops
        from megatron_mm.mimic.record import record
        from megatron_mm.mimic.rounds import Rows

        model = self.engine.run.model
        rows = Rows([str(self.data / "mix.jsonl")], PROBED, 64)
        layers, topk = [*hops(model)], model.language.moe_router_topk
        found: dict = {}
        record(self.engine, self.tokenizer, rows, layers, topk, 0, found.__setitem__)
        return found

    def information(self) -> float:
        """Returns the information of experts about skills given the token, beyond chance, in nats:
        a mean over layers."""
        from megatron_mm.earl.count_probe import count_probe
        from megatron_mm.earl.probe import Probe, open_probe
        from megatron_mm.earl.route_counts import mutual_information

        probe = Probe(str(self.data / "mix.jsonl"), samples=PROBED, shuffles=0)
        opened = open_probe(self.engine, self.tokenizer, probe)
        counted = count_probe(self.engine, self.tokenizer, opened)
        counts = counted.halves[0] + counted.halves[1]
        pairs = [mutual_information(counts.layer(layer)) for layer in range(counts.sizes[0])]
        return float(np.mean([nats - chance for nats, chance in pairs]))

    def without(self, skill_map: Any) -> dict[str, Any]:
        """Returns the causal test of a skill map on the first questions."""
        from megatron_mm.earl.discovery import forbid_clusters

        run = self.engine.run
        fewer = replace(run.evaluation, eval_samples=ASKED * KINDS)
        self.engine.run = replace(run, evaluation=fewer)
        try:
            return forbid_clusters(self.engine, self.tokenizer, skill_map)
        finally:
            self.engine.run = run


def measure(measured: Measured, run: Path, skills: Any, mapped: Any) -> dict[str, Any]:
    """Returns the figures of a run."""
    points: dict[str, Any] = {}
    checkpoints, last = at_shares(run / "checkpoint"), None
    for share, path in checkpoints.items():
        measured.load(path)
        routes = measured.routes()
        points[str(share)] = {
            "flips": None if last is None else flipped(last, routes),
            # At the end they stand in answers.jsonl.
            "scores": measured.answers() if share < SHARES[-1] else None,
        }
        last = routes
    language = measured.engine.run.model.language
    sizes = language.num_experts, measured.engine.config.num_layers, language.moe_router_topk
    student = measured.without(image_of(skills, mapped, *sizes))
    found = alike(skills.info["causal_test"], student)
    return {
        "points": points,
        "information": measured.information(),
        "causal": student,
        "alike": found and found[0],
        "alike by chance": found and found[1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    from megatron_mm.checkpoint.command import CheckpointCommand
    from megatron_mm.config import hops
    from megatron_mm.data.tokenizer import load_tokenizer
    from megatron_mm.earl.skill_map import load_skill_map
    from megatron_mm.earl.stored_run import stored_run
    from megatron_mm.mimic.expert_map import load_expert_map
    from megatron_mm.mimic.route_file import RouteFile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("run", "map", "routes", "skills", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args(argv)
    with CheckpointCommand() as command:
        _, stored = command.resolve(args.run / "checkpoint")
        flags = ["--eval-batch-size", "512"]
        run = stored_run(stored["config"], flags, 1, str(args.data / "valid.jsonl"))
        routes, language = RouteFile(args.routes), run.model.language
        layers = [*hops(run.model)]
        mapped = load_expert_map(args.map, routes, layers, language.num_experts)
        of_teacher = routes.teacher.num_layers, routes.teacher.num_experts
        skills = load_skill_map(args.skills, *of_teacher, None)
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        measured = Measured(command.engine(run), tokenizer, args.data)
        found = measure(measured, args.run, skills, mapped)
        kept = {path.name for path in at_shares(args.run / "checkpoint").values()}
        with whole_file(args.run / "points.json") as partial:
            partial.write_text(json.dumps(found) + "\n")
            for path in (args.run / "checkpoint").glob("iter_*"):
                if path.name not in kept:
                    shutil.rmtree(path)
    return command.status


if __name__ == "__main__":
    raise SystemExit(main())
