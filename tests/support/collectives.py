"""How often a step of a trainer sends objects, and how often its ranks agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from megatron_mm.engine import feed
from support.trainers import new_trainer

OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


@contextmanager
def counting(owner: object, name: str, called: Callable) -> Iterator[None]:
    """Calls `called(*arguments)` before each call of the owner's function inside the context."""
    original = getattr(owner, name)

    def call(*arguments, **keywords):
        called(*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def on_rank_collectives(run, steps: int, start: Callable = new_trainer) -> list[dict[str, int]]:
    """Returns for each step how often it called each collective that sends objects, and
    `agreements`, how often feed exchanged numbers."""
    trainer = start(run)
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable:
        return lambda *_: counts.update([name])

    found = []
    with ExitStack() as stack:
        stack.enter_context(counting(feed, "largest", count("agreements")))
        for name in OBJECTS:
            stack.enter_context(counting(dist, name, count(name)))
        for _ in range(steps):
            counts.clear()
            trainer.step()
            found.append(dict(counts))
    trainer.source.close()
    return found
