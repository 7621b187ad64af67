"""Which tests the expression of `pytest -m` chooses."""

from __future__ import annotations

from itertools import chain, combinations

from _pytest.mark.expression import Expression

MARKERS = ("gpu", "ranks", "launches", "kills", "slow")


def chooses(expression: str, marker: str) -> bool:
    """Returns whether `expression` takes a test because it has `marker`: some test that has it is
    chosen, and would not be without. `gpu and not slow` chooses gpu; `not slow` does not, though
    it takes tests marked gpu too."""
    if not expression:
        return False
    taken = Expression.compile(expression).evaluate
    others = [name for name in MARKERS if name != marker]
    sets = chain.from_iterable(combinations(others, n) for n in range(len(others) + 1))
    return any(
        taken(lambda name, held=held: name in (*held, marker))
        and not taken(lambda name, held=held: name in held)
        for held in sets
    )
