"""What a rollout says about itself, under the names of TRL and verl; the same on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.alignment import Alignment, Span
from megatron_mm.earl.route_counts import count_routes, mutual_information
from megatron_mm.earl.router_reward import hit_rates, label_positions
from megatron_mm.earl.spans import token_pieces
from megatron_mm.evaluation.scoring import result_key
from megatron_mm.generation.lanes import Completion
from megatron_mm.parallel.groups import Groups
from megatron_mm.rl.advantages import Advantages, component_sums
from megatron_mm.rl.rollout.collect import Collected

SHOWN_GROUPS = 4  # in the table of completions
MAX_COUNTED = 1 << 14  # positions behind a rollout's mutual information

Pairs = dict[str, list[float]]  # numerator and denominator


@dataclass
class Rollout:
    """Shapes: P groups, G completions of each, C rewards (the router's among them), N = P x G."""

    collected: Collected
    names: list[str]
    rewards_PGC: torch.Tensor
    failed_PGC: torch.Tensor
    advantages: Advantages
    hits: dict[str, torch.Tensor] | None  # of `Alignment.sums`
    completions: list[Completion]
    spans: list[list[Span]]


def rollout_metrics(
    rollout: Rollout,
    groups: Groups,
    weights: Sequence[float],
    alignment: Alignment | None,
    layers: Sequence[int],
    sizes: tuple[int, int],
) -> dict[str, float]:
    """Every rank of the job calls it.

    Args:
        weights: of the task's rewards, the first of `rollout.names`.
        layers: moe indices of this rank's routes.
        sizes: experts of a layer, tokens of the vocabulary.
    """
    pairs: Pairs = {}
    if groups.is_reader:
        pairs |= {k: v.tolist() for k, v in rollout.advantages.sums.items()}
        components = component_sums(rollout.rewards_PGC, rollout.failed_PGC, rollout.names)
        pairs |= {k: v.tolist() for k, v in components.items()}
        pairs |= _lengths(rollout.completions)
        pairs |= _by_skill(rollout, weights)
        pairs |= _hits(rollout.hits, alignment)
        found = rollout.collected
        pairs["rollout/generated"] = [float(found.generated), 0.0]
        pairs["rollout/skipped"] = [float(len(found.skipped)), 0.0]
        pairs["rollout/missing_clusters"] = [float(found.missing), 0.0]
    load: dict[int, torch.Tensor] = {}
    if groups.pg.tp_cp.rank() == 0 and layers:
        load, information = _routes(rollout, alignment, layers, sizes)
        pairs |= information
    parts: list = [None] * groups.world.size()
    dist.all_gather_object(parts, (pairs, load, _extremes(rollout)), group=groups.world)
    totals: Pairs = defaultdict(lambda: [0.0, 0.0])
    for mine, _, _ in parts:
        for name, (numerator, denominator) in mine.items():
            totals[name][0] += numerator
            totals[name][1] += denominator
    metrics = {
        name: total if name.startswith("rollout/") and not count else total / max(count, 1e-9)
        for name, (total, count) in totals.items()
        if count or name.startswith("rollout/")
    }
    metrics["train/skipped_samples"] = metrics.pop("rollout/skipped")  # as in supervised training
    metrics["completions/min_length"] = min(low for _, _, (low, _) in parts)
    metrics["completions/max_length"] = max(high for _, _, (_, high) in parts)
    metrics["rollout/rounds"] = rollout.collected.rounds
    metrics |= _load_violation([load for _, load, _ in parts])
    metrics |= {f"timing_s/{name}": s for name, s in rollout.collected.seconds.items()}
    return metrics


def completions_table(
    rollout: Rollout, tokenizer: Tokenizer, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Some completions with what they earned; on a reader."""
    rows = []
    size = rollout.rewards_PGC.shape[1]
    for p, group in enumerate(rollout.collected.groups[:SHOWN_GROUPS]):
        messages = group.prompt.row["messages"]
        asked = [m["content"] for m in messages if m["role"] == "user"]
        for g, completion in enumerate(group.completions):
            ids = completion.tokens_G.tolist()
            pieces, marks = token_pieces(ids, tokenizer), rollout.spans[p * size + g]
            rewards = rollout.rewards_PGC[p, g].tolist()
            rows.append(
                {
                    "row": group.prompt.where,
                    "question": asked[-1] if asked else "",
                    "key": result_key(group.prompt.row),
                    "truth": group.prompt.row.get("ground_truth"),
                    "completion": tokenizer.decode(ids[:-1] if completion.finished else ids),
                    "finished": completion.finished,
                    "rewards": {
                        n: r if r == r else None for n, r in zip(names, rewards, strict=True)
                    },
                    "advantage": float(rollout.advantages.advantages_PG[p, g]),
                    "right_spans": [correct for *_, correct in marks],
                    # In characters of the completion.
                    "span_places": [
                        [pieces[start][0], pieces[stop - 1][1]] for start, stop, *_ in marks
                    ],
                }
            )
    return rows


def _lengths(completions: Sequence[Completion]) -> Pairs:
    """Names as in TRL."""
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


def _extremes(rollout: Rollout) -> tuple[float, float]:
    lengths = [len(c.tokens_G) for c in rollout.completions]
    return (min(lengths), max(lengths)) if lengths else (float("inf"), 0.0)


def _by_skill(rollout: Rollout, weights: Sequence[float]) -> Pairs:
    """The task's reward, without the router's, and by the rows' skill."""
    count = len(weights)
    usable = ~(rollout.failed_PGC | rollout.rewards_PGC.isnan())[..., :count]
    values = torch.where(usable, rollout.rewards_PGC[..., :count], 0.0) * torch.tensor(weights)
    total_PG, seen_PG = values.sum(2), usable.any(2)
    pairs: Pairs = {"reward/task": [float(total_PG.sum()), float(seen_PG.sum())]}
    for p, group in enumerate(rollout.collected.groups):
        pair = pairs.setdefault(f"reward/task/{result_key(group.prompt.row)}", [0.0, 0.0])
        pair[0] += float(total_PG[p].sum())
        pair[1] += float(seen_PG[p].sum())
    return pairs


def _hits(hits: dict[str, torch.Tensor] | None, alignment: Alignment | None) -> Pairs:
    """Hit rates of the found map and of a shuffled one, and what chance would give."""
    pairs: Pairs = {}
    for which, columns in (("found", ("hit_rate", "chance")), ("control", ("hit_rate_shuffled",))):
        if hits is None:
            break
        sums_S4 = hits[which].sum(0)
        rates = hit_rates(sums_S4)
        for column, name in enumerate(columns):
            shares = [*rates[:, column].tolist()]
            for skill, share, count in zip(
                alignment.found.names, shares, sums_S4[:, 2].tolist(), strict=True
            ):
                if count:
                    pairs[f"rollout/moe/{name}/{skill}"] = [share * count, count]
                    whole = pairs.setdefault(f"rollout/moe/{name}", [0.0, 0.0])
                    whole[0] += share * count
                    whole[1] += count
    return pairs


def _routes(
    rollout: Rollout, alignment: Alignment | None, layers: Sequence[int], sizes: tuple[int, int]
) -> tuple[dict[int, torch.Tensor], Pairs]:
    """How often each expert was used in each layer of this rank; I(expert; skill | token) beyond
    what chance gives, of this replica's completions alone (the counts are too many to travel)."""
    experts, vocabulary = sizes
    flat = [c for c in rollout.completions if c.routes_SLk is not None]
    if not flat:
        return {}, {}
    routes = torch.cat([c.routes_SLk for c in flat]).long()
    load = {
        layer: torch.bincount(routes[:, n].flatten(), minlength=experts)
        for n, layer in enumerate(layers)
    }
    if alignment is None or alignment.found is None:
        return load, {}
    # The first sampled position is left out: its token belongs to the prompt.
    parts, skills, tokens = [], [], []
    for completion, marks in zip(rollout.completions, rollout.spans, strict=True):
        count = len(completion.tokens_G)
        parts.append(completion.routes_SLk[-count:][1:])
        skills.append(label_positions(count, marks)[0][1:])
        tokens.append(completion.tokens_G[:-1])
    names = len(alignment.found.names)
    # A sample of positions: the table of a layer has a cell for each expert, skill and token.
    cut = slice(MAX_COUNTED)
    counts = count_routes(
        torch.cat(parts)[cut],
        torch.cat(skills)[cut],
        torch.cat(tokens)[cut],
        experts,
        names,
        vocabulary,
    )
    information = [mutual_information(counts.layer(n)) for n in range(len(layers))]
    excess = sum(found - chance for found, chance in information)
    return load, {"rollout/moe/mutual_information": [excess, float(len(layers))]}


def _load_violation(loads: Sequence[dict[int, torch.Tensor]]) -> dict[str, float]:
    """How far the busiest expert is above the mean, averaged over layers (arXiv 2408.15664's
    MaxVio)."""
    total: dict[int, torch.Tensor] = {}
    for load in loads:
        for layer, counts in load.items():
            total[layer] = total[layer] + counts if layer in total else counts
    if not total:
        return {}
    worst = [float(counts.max() / counts.double().mean()) - 1 for counts in total.values()]
    return {"rollout/moe/max_violation": sum(worst) / len(worst)}
