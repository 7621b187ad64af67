"""Products that a backward pass repeats, told apart from those of the model.

A checkpoint runs its block a second time, and the loss makes its logits a second time where it
keeps none. They cost a GPU their seconds, but no model FLOPs. Attention's and the delta rule's
kernels repeat some inside (`kernels.py`, `standins.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from megatron_mm.model import recompute
from megatron_mm.model.layers.cross_entropy import Softmax
from megatron_mm.perf.recorder import Recorder


@contextmanager
def repeats(recorder: Recorder) -> Iterator[None]:
    """Inside, what is computed a second time is marked as such in the recorder. Set in the modules
    that do it, because at torch's dispatcher a second time looks like the first."""
    of_block, of_logits = recompute._repeating, Softmax.logits

    @contextmanager
    def block(context: recompute.Pass | None) -> Iterator[None]:
        with of_block(context), recorder.repeating():
            yield

    def logits(*args):
        backward = torch._C._current_graph_task_id() >= 0
        with recorder.repeating() if backward else nullcontext():
            return of_logits(*args)

    def stand_in(for_block: Callable, for_logits: Callable) -> None:
        for owner, name, made in (
            (recompute, "_repeating", for_block),
            (Softmax, "logits", for_logits),
        ):
            setattr(owner, name, made)

    stand_in(block, logits)
    try:
        yield
    finally:
        stand_in(of_block, of_logits)
