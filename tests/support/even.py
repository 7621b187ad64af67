"""A reward and a labeller for models that have learnt nothing."""

from __future__ import annotations

from megatron_mm.earl.spans import Label


def even(prompts, completions, completion_ids, **columns):
    """The share of even token ids: differs between completions, whatever they say."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def same(prompts, completions, completion_ids, **columns):
    """Nothing to learn from."""
    return [0.0 for _ in completion_ids]


def fails_on_short(prompts, completions, completion_ids, **columns):
    """Raises for completions whose last token is odd."""
    for ids in completion_ids:
        if ids[-1] % 2:
            raise ValueError(f"odd end {ids[-1]}")
    return [1.0 for _ in completion_ids]


def routed(prompts, completions, completion_ids, routed_experts, **columns):
    """A number of the experts that were used, by layer and position."""
    scores = []
    for ids, routes in zip(completion_ids, routed_experts, strict=True):
        assert routes.shape[:2] == (len(ids), 2), routes.shape
        layers = routes.long().sort(-1).values.sum((0, 2)).tolist()
        scores.append((layers[0] + 100 * layers[1]) / 1e4)
    return scores


def thirds(row, text, where):
    """The first third exercises the row's skill and is right, the second is wrong."""
    third = len(text) // 3
    if not third:
        return []
    skill = row["skill"]
    return [Label(0, third, skill, True), Label(third, 2 * third, skill, False)]


def sometimes(prompts, completions, completion_ids, scene, **columns):
    """As `even`, but all completions of a prompt earn the same where the scene's first digit is
    odd: groups of no use to a policy."""
    values = even(prompts, completions, completion_ids)
    return [1.0 if int(s[0]) % 2 else v for s, v in zip(scene, values, strict=True)]
