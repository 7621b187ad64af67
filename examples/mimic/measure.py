"""Measure a run of `arms.py` beyond its last answers: on the way, and without experts.

    python -m examples.mimic.measure --run runs/arms/mimic/seed1/scratch/mimic \\
        --map runs/arms/mimic/seed1/scratch/map.st --routes runs/arms/mimic/routes.st \\
        --skills runs/arms/mimic/skills.json --data runs/arms/mimic/data

At 10, 25 and 50 % of its steps the questions are asked again, and between these checkpoints and the
last one the share of routes that changed is counted, over the answers of probed rows. The last one
is asked without the experts that stand, by the run's own map, for each cluster of the teacher's:
if what breaks is what breaks in the teacher, the student works alike. Figures go into points.json;
the other checkpoints are deleted.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

SHARES = (10, 25, 50, 100)  # per cent of the steps
PROBED = 300  # rows of which routes are compared
ASKED, KINDS = 40, 16  # questions of each kind for the causal test


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
    """Returns a student's skill map: in each mapped layer the experts that most of a teacher's
    cluster is dealt to, of each expert's share of all that is dealt to it. As many as keep the
    cluster's part of the experts, rounded up.

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
                dealt_S = a_TS[cluster].sum(0) / a_TS.sum(0).clamp(min=1e-9)
                count = -(-len(cluster) * num_experts // skills.num_experts)
                found[skill][mine] = sorted(dealt_S.topk(count).indices.tolist())
    return SkillMap(layers, num_experts, topk, found)


def falls(causal: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Returns how far each skill's accuracy falls without each skill's cluster."""
    accuracy = causal["accuracy"]
    return {
        (without, skill): accuracy[skill] - value
        for without, found in causal["without"].items()
        for skill, value in found.items()
    }


def alike(teacher: dict[str, Any], student: dict[str, Any]) -> float | None:
    """Returns the correlation of what breaks in both; None if nothing breaks in one of them."""
    ours, theirs = falls(student), falls(teacher)
    shared = sorted(ours.keys() & theirs.keys())
    pairs = np.array([[ours[key], theirs[key]] for key in shared]).T
    if len(shared) < 3 or not pairs.std(axis=1).all():
        return None
    return float(np.corrcoef(pairs)[0, 1])


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
        """Returns the score of each question, by kind."""
        from examples.digits.measure import Measured as Asking

        found: dict[str, dict[int, float]] = {}
        for record in Asking(self.engine, self.tokenizer, self.data).ask("valid"):
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
        return record(self.engine, self.tokenizer, rows, layers, topk, 0)

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
    return {
        "points": points,
        "information": measured.information(),
        "causal": student,
        "alike": alike(skills.info["causal_test"], student),
    }


def main(argv: Sequence[str] | None = None) -> int:
    from megatron_mm.checkpoint.command import CheckpointCommand
    from megatron_mm.config import hops
    from megatron_mm.data.tokenizer import load_tokenizer
    from megatron_mm.earl.skill_map import load_skill_map
    from megatron_mm.earl.stored_run import stored_run
    from megatron_mm.mimic.expert_map import load_expert_map, permuted
    from megatron_mm.mimic.route_file import RouteFile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("run", "map", "routes", "skills", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--shuffled", type=int, help="seed of the control, whose map it learnt")
    args = parser.parse_args(argv)
    with CheckpointCommand() as command:
        _, stored = command.resolve(args.run / "checkpoint")
        flags = ["--eval-batch-size", "512"]
        run = stored_run(stored["config"], flags, 1, str(args.data / "valid.jsonl"))
        routes, language = RouteFile(args.routes), run.model.language
        layers = [*hops(run.model)]
        mapped = load_expert_map(args.map, routes, layers, language.num_experts)
        if args.shuffled is not None:
            mapped = permuted(mapped, args.shuffled)
        of_teacher = routes.teacher.num_layers, routes.teacher.num_experts
        skills = load_skill_map(args.skills, *of_teacher, None)
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        measured = Measured(command.engine(run), tokenizer, args.data)
        found = measure(measured, args.run, skills, mapped)
        part = args.run / "part_points.json"
        part.write_text(json.dumps(found) + "\n")
        kept = {path.name for path in at_shares(args.run / "checkpoint").values()}
        for path in (args.run / "checkpoint").glob("iter_*"):
            if path.name not in kept:
                shutil.rmtree(path)
        part.rename(args.run / "points.json")
    return command.status


if __name__ == "__main__":
    raise SystemExit(main())
