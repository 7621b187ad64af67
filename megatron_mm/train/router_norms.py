"""Norms of the routers' gradients: how hard each router is pushed."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mm import platform
from megatron_mm.checkpoint.optimizer_state import owned
from megatron_mm.engine.engine import Engine
from megatron_mm.report.metrics_log import ROUTER_NORM


class RouterNorms:
    """Gradient norms of the routers that this rank updates, which are found once."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.routers = [
            (int(name.split("layers.")[1].split(".")[0]), mine)
            for name, mine in owned(engine).items()
            if name.endswith(".inner.router.weight")  # of a second hop it is another one
        ]

    def measure(self) -> dict[str, float]:
        """Returns `ROUTER_NORM` and the number of the layer, from 0 -> norm before clipping;
        nothing where routers are frozen. Every rank of the job calls it, after
        `Engine.gradient_norm`."""
        layers = self.engine.config.num_layers
        learning = [(n, mine) for n, mine in self.routers if mine.main.grad is not None]
        # Squares, and how many of the router's elements they are of: all ranks of its stage have
        # the same gradient, whole or, with the distributed optimizer, in parts.
        sums = torch.zeros(2, layers, dtype=torch.float64, device=platform.device())
        if learning:
            gradients = [mine.main.grad for _, mine in learning]
            norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float64))
            counts = [float(mine.stop - mine.start) for _, mine in learning]
            counts_L = torch.tensor(counts, dtype=torch.float64)
            at_L = torch.tensor([layer for layer, _ in learning])
            here = torch.stack((norms.square(), platform.moved(counts_L, norms.device)))
            sums.index_add_(1, platform.moved(at_L, norms.device), here)
        dist.all_reduce(sums)
        language = self.engine.run.model.language
        whole = language.num_experts * language.hidden_size
        return {
            f"{ROUTER_NORM}{layer}": (squares * whole / held) ** 0.5
            for layer, (squares, held) in enumerate(sums.t().tolist())
            if held
        }
