"""The metrics of a rollout, under the names of TRL and verl, and some of its completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.data.messages import IMAGE_MARK, check_messages
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Maps
from megatron_mm.earl.metrics import (
    Pairs,
    expert_load,
    hit_pairs,
    information_pairs,
    load_violation,
)
from megatron_mm.earl.spans import token_pieces
from megatron_mm.engine.totals import KnownTotals
from megatron_mm.evaluation.scoring import result_key
from megatron_mm.generation.lanes import Completion
from megatron_mm.parallel.agreement import largest
from megatron_mm.parallel.groups import Groups
from megatron_mm.report.metrics import Total
from megatron_mm.rl.advantages import component_sums
from megatron_mm.rl.credit import Credited

SHOWN_GROUPS = 4  # in the table of completions


def rollout_metrics(
    credited: Credited,
    groups: Groups,
    maps: Maps | None,
    layers: Sequence[int],
    sizes: tuple[int, int, int],
    seconds: Mapping[str, float],
    taught: Pairs,
    known: KnownTotals,
) -> dict[str, float]:
    """Returns the metrics of the whole job's rollout, the same on every rank but for
    `timing_s/*`, which are this rank's. Every rank of the job calls it.

    Args:
        layers: moe indices of this rank's routes.
        sizes: layers of experts in the model, experts of a layer, tokens of the vocabulary.
        seconds: by phase.
        taught: `teacher_sums`; empty without teachers.
        known: what earlier rollouts have told.
    """
    scored = credited.scored
    completions = scored.completions
    num_layers, experts, vocabulary = sizes
    pairs: Pairs = {}
    if groups.is_reader:
        pairs |= {k: v.tolist() for k, v in credited.advantages.sums.items()}
        components = component_sums(credited.rewards_PGC, credited.failed_PGC, credited.names)
        pairs |= {k: v.tolist() for k, v in components.items()}
        pairs |= _lengths(completions)
        pairs |= _by_skill(credited)
        pairs |= taught
        if credited.hits is not None and maps is not None:
            pairs |= hit_pairs(credited.hits, maps.found.names)
        pairs["rollout/generated"] = [float(scored.generated), 0.0]
        pairs["rollout/skipped"] = [float(len(scored.skipped)), 0.0]
        pairs["rollout/missing_clusters"] = [float(scored.missing), 0.0]
        for name, value in scored.logged:
            total, count = pairs.get(name, [0.0, 0.0])
            pairs[name] = [total + value, count + 1]
    load_LE = torch.zeros(num_layers, experts, dtype=torch.int64)
    if groups.pg.tp_cp.rank() == 0 and layers:
        load = expert_load(completions, layers, experts)
        for layer, counts in load.items():
            load_LE[layer] = counts
        if load and maps is not None:
            table = experts, len(maps.found.names), vocabulary
            k = maps.found.moe_router_topk
            pairs |= information_pairs(completions, scored.spans_N, len(layers), k, table)
    parts = _everywhere(pairs, groups, known)
    low, high = _extremes(completions)
    highest, lowest = largest([high, -low])
    dist.all_reduce(load_LE, group=groups.world)
    metrics = _ratios(parts)
    metrics["completions/min_length"] = -lowest
    metrics["completions/max_length"] = highest
    metrics["rollout/rounds"] = scored.rounds
    metrics |= load_violation(load_LE)
    metrics |= {f"timing_s/{name}": s for name, s in seconds.items()}
    return metrics


def _everywhere(pairs: Pairs, groups: Groups, known: KnownTotals) -> list[Pairs]:
    """The pairs of every rank."""
    mine = {name: Total("mean", *pair) for name, pair in pairs.items()}
    parts = known.gather(mine)
    if parts is None:
        parts = [{} for _ in range(groups.world.size())]
        dist.all_gather_object(parts, mine, group=groups.world)
        known.learn(parts)
    return [{n: [total.value, total.weight] for n, total in part.items()} for part in parts]


def _ratios(parts: Sequence[Pairs]) -> dict[str, float]:
    """Sums the pairs of all ranks and divides; counts of the rollout stay sums."""
    totals: Pairs = defaultdict(lambda: [0.0, 0.0])
    for mine in parts:
        for name, (numerator, denominator) in mine.items():
            totals[name][0] += numerator
            totals[name][1] += denominator
    metrics = {
        name: total if name.startswith("rollout/") and not count else total / max(count, 1e-9)
        for name, (total, count) in totals.items()
        if count or name.startswith("rollout/")
    }
    metrics["train/skipped_samples"] = metrics.pop("rollout/skipped")  # as in supervised training
    return metrics


def completions_table(credited: Credited, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns the completions of a few groups with what they earned; on a reader."""
    rows = []
    for p, group in enumerate(credited.scored.groups[:SHOWN_GROUPS]):
        messages = check_messages(group.asked.row, group.asked.where)
        asked = [IMAGE_MARK.join(m.texts) for m in messages if m.role == "user"]
        for g, completion in enumerate(group.completions):
            ids = completion.tokens_G.tolist()
            pieces, marks = token_pieces(ids, tokenizer), credited.scored.spans[p][g]
            rewards = credited.rewards_PGC[p, g].tolist()
            rows.append(
                {
                    "row": group.asked.where,
                    "question": asked[-1] if asked else "",
                    "key": result_key(group.asked.row),
                    "truth": group.asked.row.get("ground_truth"),
                    "completion": tokenizer.decode_answer(ids),
                    "finished": completion.finished,
                    "rewards": {
                        name: r if r == r else None
                        for name, r in zip(credited.names, rewards, strict=True)
                    },
                    "advantage": float(credited.advantages.advantages_PG[p, g]),
                    "right_spans": [correct for *_, correct in marks],
                    # In characters of the completion.
                    "span_places": [
                        [pieces[start][0], pieces[stop - 1][1]] for start, stop, *_ in marks
                    ],
                }
            )
    return rows


def _lengths(completions: Sequence[Completion]) -> Pairs:
    """Returns lengths under TRL's names."""
    count, ended = float(len(completions)), [c for c in completions if c.finished]
    tokens = float(sum(len(c.tokens_G) for c in completions))
    return {
        "completions/mean_length": [tokens, count],
        "completions/clipped_ratio": [count - len(ended), count],
        "completions/mean_terminated_length": [
            float(sum(len(c.tokens_G) for c in ended)),
            float(len(ended)),
        ],
    }


def _extremes(completions: Sequence[Completion]) -> tuple[int, int]:
    """Returns the lengths of the shortest and the longest completion; of none, the largest number
    and 0."""
    lengths = [len(c.tokens_G) for c in completions]
    return (min(lengths), max(lengths)) if lengths else (2**62, 0)


def _by_skill(credited: Credited) -> Pairs:
    """Returns the weighted sum of the reward functions alone, over all rows and by the rows'
    skill."""
    total_PG = credited.task_rewards_PG
    seen_PG, total_PG = ~total_PG.isnan(), total_PG.nan_to_num(nan=0.0)
    pairs: Pairs = {"reward/task": [float(total_PG.sum()), float(seen_PG.sum())]}
    for p, group in enumerate(credited.scored.groups):
        pair = pairs.setdefault(f"reward/task/{result_key(group.asked.row)}", [0.0, 0.0])
        pair[0] += float(total_PG[p].sum())
        pair[1] += float(seen_PG[p].sum())
    return pairs
