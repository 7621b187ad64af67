"""Decoding steps as CUDA graphs: one launch in place of hundreds.

A step reads and writes tensors that stay where they are (model/decode.py, generation/lanes.py), and
no number of it changes from one step to the next but in them. So it can be recorded once and
replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch

from megatron_mm import platform
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.exchange import Drawn
from megatron_mm.generation.sampling import Sampling
from megatron_mm.model.layers.moe import MixtureOfExperts

Step = Callable[[], list[Drawn]]
Record = Callable[[Step], Step]  # a step, which is not run -> the same step, recorded


class Replayed:
    """Runs steps of equal shapes: the first as it is, which also prepares its kernels, the others
    as a recording.

    Args:
        record: None: every step is run as it is.
    """

    def __init__(self, record: Record | None):
        self.record = record
        self._where: Hashable = None
        self._found: dict[Hashable, Step | None] = {}

    def run(self, step: Step, shape: Hashable, where: Callable[[], Hashable]) -> list[Drawn]:
        """Runs a step.

        Args:
            shape: of all that the step computes with; steps of one shape share a recording.
            where: the addresses of its tensors. A recording ends when they move.
        """
        if self.record is None:
            return step()
        here = where()
        if here != self._where:
            self._found.clear()
            self._where = here
        if shape not in self._found:
            self._found[shape] = None
            return step()
        recorded = self._found[shape]
        if recorded is None:
            recorded = self._found[shape] = self.record(step)
        return recorded()


def recorder(engine: Engine, sampling: Sampling) -> Record | None:
    """Returns how steps of this run are recorded; None where they are not: without a GPU, on a
    pipeline, with expert parallelism, where routers draw, and where experts have no kernel for all
    of their products, so that a step waits for the host."""
    backend = engine.run.backend
    experts = [m for c in engine.chunks for m in c.modules() if isinstance(m, MixtureOfExperts)]
    possible = (
        backend.decoding_cuda_graph
        and platform.device().type == "cuda"
        and backend.transformer_impl == "local"
        and engine.groups.pg.pp.size() == engine.groups.pg.ep.size() == 1
        and not sampling.router_temperature
        and all(
            m.steps_alone and m.experts.in_one_kernel(engine.config.params_dtype) for m in experts
        )
    )
    # One pool of memory: no two graphs run at a time, and what they return is copied.
    return partial(cuda_graph, pool=torch.cuda.graph_pool_handle()) if possible else None


def cuda_graph(step: Step, pool: tuple[int, int]) -> Step:
    """Records a step as a CUDA graph.

    Args:
        pool: the memory of what it computes with, as torch numbers it.

    Raises:
        torch.OutOfMemoryError: it does not fit beside the other graphs.
        RuntimeError: if something in it cannot be recorded. Not a ConfigError, which all ranks
            would raise together.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads (NCCL's, those that pin memory) may go on with calls of their own.
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            recorded = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"a decoding step cannot be a CUDA graph ({str(error).splitlines()[0]}); "
            "--no-decoding-cuda-graph runs it without"
        ) from error

    def replay() -> list[Drawn]:
        graph.replay()
        # Copied, because the next replay writes to the same tensors.
        return [(tokens.clone(), logprobs.clone()) for tokens, logprobs in recorded]

    return replay
