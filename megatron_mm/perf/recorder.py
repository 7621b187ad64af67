"""Memory, FLOPs and traffic of a piece of the program, seen at torch's dispatcher.

The same recorder watches real ranks and ranks whose tensors have no memory ("meta"); there it
also answers for the collectives, which do not run. Memory is counted in whole storages,
from the operation that makes one to the end of its last reference; storages that existed before
and the workspace inside a kernel do not count.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten, c10d = torch.ops.aten, torch.ops.c10d

# The argument that holds the tensors this rank gives away, by collective; DDP's coalescing too.
_GIVEN = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}
_SILENT = ("recv_", "barrier", "monitored_barrier_")
_ONLY_WORK = (
    "send",
    "recv_",
    "alltoall_base_",
    "barrier",
    "allreduce_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
)

_ALLOCATE = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided)

# Groups by their role; of two roles with one group the first counts.
ROLES: tuple[str, ...] = ("tp", "cp", "ep", "pp", "expt_tp", "tp_ep", "dp", "dp_cp", "expt_dp")
ROLES += ("tp_cp", "tp_dp_cp", "mp", "tp_ep_pp", "intra_dp_cp", "intra_expt_dp")


class Link(NamedTuple):
    """Ranks that talk: a collective, and the role of its group."""

    kind: str
    group: str


@dataclass
class Work:
    """Work that was done: computed and sent.

    Attributes:
        flops: of matrix products and attention, as torch.utils.flop_counter counts them.
        moved: bytes read and written by every other operation that is no view.
        launches: operations that are no view: kernels, at least.
        sent: bytes that this rank gave to each kind of collective.
    """

    flops: int = 0
    moved: int = 0
    launches: int = 0
    sent: Counter[Link] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.moved + other.moved,
            self.launches + other.launches,
            self.sent + other.sent,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.flops - other.flops,
            self.moved - other.moved,
            self.launches - other.launches,
            self.sent - other.sent,
        )

    def times(self, count: int) -> Work:
        sent = Counter({link: count * size for link, size in self.sent.items()})
        return Work(count * self.flops, count * self.moved, count * self.launches, sent)


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, _heads_of(query, key), _heads_of(query, value))


def _attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    shapes = query.shape, _heads_of(query, key), _heads_of(query, value)
    return sdpa_backward_flop_count(grad.shape, *shapes)


def _heads_of(query: torch.Tensor, shared: torch.Tensor) -> tuple[int, ...]:
    """Grouped keys and values are multiplied once for each query head."""
    return (shared.shape[0], query.shape[1], *shared.shape[2:])


# The CPU's kernel, which torch's table lacks, by the formulas of the GPU's; its wrapped form.
ATTENTION_FLOPS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
for _formula in ATTENTION_FLOPS.values():
    _formula._get_raw = True  # type: ignore[attr-defined]  # torch's mark of a wrapped formula


class Recorder(TorchDispatchMode):
    """
    Attributes:
        live: bytes of the storages made inside and not yet freed.
        peak: the most they were since `rebase`.
        work: since the beginning.
    """

    def __init__(self, pg: ProcessGroupCollection):
        super().__init__()
        self.live = self.peak = 0
        self.work = Work()
        self._sizes: dict[int, tuple[int, weakref.ref]] = {}
        self._pg = pg
        self._roles: dict[str, str] = {}
        for role in ROLES:
            group = getattr(pg, role, None)
            if isinstance(group, ProcessGroup):
                self._roles.setdefault(group.group_name, role)

    def groups(self) -> dict[str, tuple[int, ...]]:
        """The ranks of every group, by role."""
        found = {role: getattr(self._pg, role) for role in self._roles.values()}
        return {role: tuple(dist.get_process_group_ranks(pg)) for role, pg in found.items()}

    def rebase(self) -> int:
        """Begins a new peak here; returns the bytes that are live."""
        self.peak = self.live
        return self.live

    def add_flops(self, count: int) -> None:
        """Adds the FLOPs of a kernel that no operation shows."""
        self.work.flops += count

    def copy(self) -> Work:
        """The work so far, to take the difference later."""
        return self.work + Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        out = func(*args, **kwargs)
        given = list(_tensors((args, kwargs.values())))
        made = list(_tensors(out))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in known]
        for tensor in fresh:
            self._keep(tensor.untyped_storage())
        self._count(func, args, kwargs, out, given, made, bool(fresh))
        return out

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return

        def freed(_, key=key, size=size):
            self.live -= size
            del self._sizes[key]

        self._sizes[key] = size, weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _count(self, func, args, kwargs, out, given, made, fresh: bool) -> None:
        packet = func._overloadpacket
        if packet in flop_registry:
            self.work.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            self.work.launches += 1
        elif packet in ATTENTION_FLOPS:
            self.work.flops += ATTENTION_FLOPS[packet](*args, **kwargs, out_val=out)
            self.work.launches += 1
        elif (fresh or func._schema.is_mutable) and packet not in _ALLOCATE:
            self.work.moved += sum(_bytes(tensor) for tensor in (*given, *made))
            self.work.launches += 1

    def _collective(self, func, args, kwargs):
        name = func._overloadpacket.__name__
        if name in _GIVEN:
            kind, place = _GIVEN[name]
            boxes = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.ScriptObject))
            group = ProcessGroup.unbox(next(boxes))
            # Of two pipeline ranks one sends in the group of everybody, to not wait for the other.
            role = "pp" if kind == "send" else self._roles.get(group.group_name, "other")
            link = Link(kind, role)
            if group.size() > 1:
                self.work.sent[link] += sum(_bytes(tensor) for tensor in _tensors(args[place]))
        elif name not in _SILENT:
            raise NotImplementedError(f"the recorder knows no collective {name}")
        if not any(tensor.is_meta for tensor in _tensors(args)):
            return func(*args, **kwargs)
        work = torch._C._distributed_c10d.FakeWork().boxed()
        return work if name in _ONLY_WORK else (args[0], work)


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, type({}.values()))):
        for branch in tree:
            yield from _tensors(branch)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
