"""Rewards and a span labeller that tell completions of an untrained model apart."""

from __future__ import annotations

from megatron_mm.earl.spans import Label


def even(prompts, completions, completion_ids, **columns):
    """Returns the share of even token ids, which differs between any completions."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def same(prompts, completions, completion_ids, **columns):
    """Returns zeros, from which nothing can be learnt."""
    return [0.0 for _ in completion_ids]


def constant(prompts, completions, completion_ids, value=0.0, **columns):
    """Returns the same value for every completion."""
    return [value for _ in completion_ids]


def tolerant(prompts, completions, completion_ids, tolerance, **columns):
    """Returns `even`'s values; cannot do without a column."""
    return even(prompts, completions, completion_ids)


def fails_on_short(prompts, completions, completion_ids, **columns):
    """Raises for completions whose last token is odd."""
    for ids in completion_ids:
        if ids[-1] % 2:
            raise ValueError(f"odd end {ids[-1]}")
    return [1.0 for _ in completion_ids]


def routed(prompts, completions, completion_ids, routed_experts, **columns):
    """Returns a sum over the experts used, which weighs the two layers differently."""
    scores = []
    for ids, routes in zip(completion_ids, routed_experts, strict=True):
        assert routes.shape[:2] == (len(ids), 2), routes.shape
        layers = routes.long().sort(-1).values.sum((0, 2)).tolist()
        scores.append((layers[0] + 100 * layers[1]) / 1e4)
    return scores


def thirds(row, text, where):
    """Labels the first third as right and the second as wrong, both with the row's skill."""
    third = len(text) // 3
    if not third:
        return []
    skill = row["skill"]
    return [Label(0, third, skill, True), Label(third, 2 * third, skill, False)]


def sometimes(prompts, completions, completion_ids, scene, **columns):
    """Returns `even`'s values, but 1 for every completion of a scene whose first digit is odd.

    A policy learns nothing from such a group.
    """
    values = even(prompts, completions, completion_ids)
    return [1.0 if int(s[0]) % 2 else v for s, v in zip(scene, values, strict=True)]


_calls = 0  # of this worker


def fails_after(prompts, completions, completion_ids, calls=0, **columns):
    """Returns `even`'s values for the first calls of a worker, then raises."""
    global _calls
    _calls += 1
    if _calls > calls:
        raise ValueError("the judge is down")
    return even(prompts, completions, completion_ids)


def none_at_all(prompts, completions, completion_ids, **columns):
    """Forgets to compare: no reward applies."""
    return [None for _ in completion_ids]


def conversational(completions, completion_ids, **columns):
    """Reads completions in TRL's conversational form; differs as `even` does."""
    assert all(completion[0]["content"] is not None for completion in completions)
    return even(None, completions, completion_ids)


def fails_on_even_end(prompts, completions, completion_ids, **columns):
    """Raises for completions whose last token is even, else returns 1."""
    if any(ids[-1] % 2 == 0 for ids in completion_ids):
        raise ValueError("even end")
    return [1.0 for _ in completion_ids]
