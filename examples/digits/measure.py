"""Measure a run of `earl_arms.py` beyond its answers: with few experts kept, out of distribution.

    python -m examples.digits.measure --run runs/arms/tiny/seed1/sft/aligned \\
        --skill-map runs/arms/tiny/seed1/map.json --data runs/arms/tiny/data

A task is a skill with those that its steps exercise. For a task a quarter, half and three quarters
of each layer's experts are kept: first those of the task's clusters and the common ones, then by
how often the task takes them; with --by-use, for a run that no map has aligned, by that alone. The
others are forbidden, and the skill's questions are asked. Figures go into measures.json of the run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.digits.scores import read_scores
from megatron_mm.outputs import whole_file

ASKED = 150  # questions of each kind with few experts
LARGER_TILES = 16  # of a scene of 4x4 cells
PROBED = 500  # rows of which the use of experts is counted


def tasks(path: Path) -> dict[str, list[str]]:
    """Returns for each skill of a file's questions the skills of its steps, itself among them."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found[row["skill"]] |= {row["skill"], *(span["skill"] for span in row["spans"])}
    return {skill: sorted(skills) for skill, skills in sorted(found.items())}


def first_of_each(keys: Sequence[str], count: int) -> dict[str, list[int]]:
    """Returns for each kind the indices of its first questions."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if len(found[key]) < count:
            found[key].append(index)
    return found


def by_kind(records: Sequence[dict]) -> dict[str, float]:
    """Returns the accuracy of each kind."""
    scores: dict[str, list[float]] = defaultdict(list)
    for record in records:
        scores[record["key"]].append(record["score"])
    return {key: float(np.mean(found)) for key, found in scores.items()}


class Measured:
    """A run's model, ready to be asked.

    Args:
        engine, tokenizer: of the run's checkpoint.
    """

    def __init__(self, engine: Any, tokenizer: Any, data: Path) -> None:
        self.engine, self.tokenizer, self.data = engine, tokenizer, data

    def ask(self, name: str, tiles: int | None = None, chosen=None, kept=None) -> list[dict]:
        """Asks questions of a file of the data. Returns a record of each.

        Args:
            tiles: most tiles of an image, in place of the run's.
            chosen: indices of the questions; None: all.
            kept: for each layer the experts that may be taken; None: all.
        """
        import torch

        from megatron_mm.evaluation.evaluate import ask
        from megatron_mm.evaluation.questions import EvalSet

        run = self.engine.run
        if tiles is not None:
            run = replace(run, data=replace(run.data, max_num_tiles=tiles))
        questions = EvalSet(self.data / f"{name}.jsonl", run, self.tokenizer)
        keys = [questions.key(index) for index in range(len(questions))]
        forbidding = nullcontext()
        if kept is not None:
            forbidden_LE = torch.ones(len(kept), run.model.language.num_experts, dtype=torch.bool)
            for layer, experts in enumerate(kept):
                forbidden_LE[layer, experts] = False
            forbidding = self.engine.forbidding(dict(enumerate(forbidden_LE)))
        asked = range(len(keys)) if chosen is None else chosen
        with forbidding:
            records = ask(self.engine, self.tokenizer, questions, asked, keys)
        assert records is not None  # nothing asks it to stop
        return records

    def use(self, skill_map: Any) -> dict[str, list[list[float]]]:
        """Returns how often each skill of the map took each expert, [L][E] of each."""
        import torch

        from megatron_mm.earl.count_probe import count_probe
        from megatron_mm.earl.probe import Probe, open_probe

        probe = Probe(str(self.data / "mix.jsonl"), samples=PROBED, shuffles=0)
        opened = open_probe(self.engine, self.tokenizer, probe)
        counted = count_probe(self.engine, self.tokenizer, opened)
        counts, skills = counted.halves[0] + counted.halves[1], opened.plan.skills
        use_SLE = counts.sums().permute(2, 0, 1)
        nothing_LE = torch.zeros(use_SLE.shape[1:], dtype=use_SLE.dtype)
        found = {skill: use_SLE[s] for s, skill in enumerate(skills)}
        return {skill: found.get(skill, nothing_LE).tolist() for skill in skill_map.names}

    def with_few(
        self, skill_map: Any, answers: Path, by_use: bool = False
    ) -> dict[str, dict[str, float]]:
        """Returns for each number of experts kept the accuracy of each kind. With all experts it is
        that of the run's own answers to the same questions.

        Args:
            by_use: choose as if no expert were in a cluster.
        """
        from megatron_mm.earl.prune import choose
        from megatron_mm.evaluation.questions import EvalSet

        path = self.data / "valid.jsonl"
        questions = EvalSet(path, self.engine.run, self.tokenizer)
        keys = [questions.key(index) for index in range(len(questions))]
        few = first_of_each(keys, ASKED)
        skill_map = replace(skill_map, info={"use": self.use(skill_map)})
        experts = skill_map.num_experts
        found: dict[str, dict[str, float]] = {}
        for count in (experts // 4, experts // 2, 3 * experts // 4):
            records = []
            for skill, needed in tasks(path).items():
                kept = choose(skill_map, needed, count, clusters=not by_use).experts
                chosen = [i for key in few if key.split("/")[0] == skill for i in few[key]]
                records += self.ask("valid", chosen=chosen, kept=kept)
            found[str(count)] = by_kind(records)
        scores = read_scores(answers)
        found[str(experts)] = {
            key: float(np.mean([scores[key][i] for i in indices])) for key, indices in few.items()
        }
        return found


def main(argv: list[str] | None = None) -> int:
    from megatron_mm.checkpoint.command import CheckpointCommand

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--skill-map", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--by-use", action="store_true", help="keep experts by use alone")
    args = parser.parse_args(argv)
    with CheckpointCommand() as command:  # before megatron-core is imported
        from megatron_mm.checkpoint import sharded
        from megatron_mm.data.tokenizer import load_tokenizer
        from megatron_mm.earl.skill_map import load_skill_map
        from megatron_mm.earl.stored_run import stored_run

        path, stored = command.resolve(args.run / "checkpoint")
        flags = ["--eval-batch-size", "512", "--max-new-tokens", "96"]
        run = stored_run(stored["config"], flags, 1, str(args.data / "valid.jsonl"))
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        engine = command.engine(run)
        sharded.load(engine, path, finetune=True)
        language = run.model.language
        sizes = engine.config.num_layers, language.num_experts, language.moe_router_topk
        measured = Measured(engine, tokenizer, args.data)
        found = {
            "num_experts": language.num_experts,
            "kept": measured.with_few(
                load_skill_map(args.skill_map, *sizes), args.run / "answers.jsonl", args.by_use
            ),
            "beyond": {
                "larger": by_kind(measured.ask("valid_larger", LARGER_TILES)),
                "longer": by_kind(measured.ask("valid_longer")),
            },
        }
        with whole_file(args.run / "measures.json") as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n")
    return command.status


if __name__ == "__main__":
    raise SystemExit(main())
