"""Which tests the expression of `pytest -m` chooses, and which files go first."""

from __future__ import annotations

from itertools import chain, combinations

from _pytest.mark.expression import Expression

# Files of tests that take a minute or more, the longest first.
LONG = (
    *("test_cluster.py", "test_grpo_loop.py", "test_distillation.py", "test_grpo.py"),
    *("test_gpu_check.py", "test_plan_80b.py", "test_loop.py", "test_cost_of_faults.py"),
    *("test_reshard.py", "test_planned_layouts.py", "test_kill.py", "test_round_trip.py"),
    *("test_fuzz.py", "test_descriptors.py", "test_launch.py", "test_measure.py"),
    *("test_pass_rate_launch.py", "test_packed_training.py", "test_rl_kill.py"),
    *("test_generate.py", "test_cascade_layouts.py", "test_invariance.py"),
)
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
