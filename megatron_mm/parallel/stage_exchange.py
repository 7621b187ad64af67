"""Tensors between pipeline stages whose shapes both sides work out themselves.

Streams have lengths of their own, so megatron-core's communicator sends the shape before every
tensor, for which the host waits for the device twice an exchange. Here every stage has the batches,
and what crosses a boundary follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table

Rows = Callable[[int, int], int]  # (chunk, microbatch) -> rows of the tensor


class StageExchange(P2PCommunicator):
    """The communicator of one run of a schedule on one rank.

    A stage receives inputs in the order of its forward passes and gradients of outputs in the order
    of its backward passes; megatron-core says of both which chunk's microbatch comes when
    (`get_schedule_table`; backward the chunks are reversed).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        config: ModelParallelConfig,
        *,
        microbatches: int,
        chunks: int,
        hidden_size: int,
        arriving: Rows,
        leaving: Rows,
    ):
        """
        Args:
            microbatches, chunks: of the schedule, on this rank.
            arriving, leaving: rows of a chunk's input and output, of this rank's part. Not asked of
                the model's first input and last output.
        """
        super().__init__(pp_group=group, config=config)
        last = group.size() - 1
        table = get_schedule_table(microbatches, chunks, group.size())
        forward = [(chunk, n) for n, chunk in table if group.rank() > 0 or chunk > 0]
        backward = [
            (chunks - 1 - chunk, n) for n, chunk in table if group.rank() < last or chunk > 0
        ]
        self._inputs = self._shapes(forward, arriving, hidden_size)
        self._gradients = self._shapes(backward, leaving, hidden_size)

    @staticmethod
    def _shapes(order: list[tuple[int, int]], rows: Rows, hidden: int) -> Iterator[list[int]]:
        return ([rows(*which), 1, hidden] for which in order)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Returns the shapes of the tensors that come next from both sides; sends nothing."""
        nothing = [0, 0, 0]
        return (
            next(self._inputs) if recv_prev else nothing,
            next(self._gradients) if recv_next else nothing,
        )
