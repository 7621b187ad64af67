"""Memory, FLOPs and traffic of a piece of the program, seen at torch's dispatcher.

The same recorder watches real ranks and ranks whose tensors have no memory ("meta"); there it
also answers for the collectives, which do not run. Memory is counted in whole storages,
from the operation that makes one to the end of its last reference; storages that existed before
and the workspace inside a kernel do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm import platform
from megatron_mm.parallel.groups import EncoderGroups
from megatron_mm.perf.kernels import Kernel, Link, Work, kernel_of, size, tensors

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

# Groups by their role; of two roles with one group the first counts.
ROLES: tuple[str, ...] = ("tp", "cp", "ep", "pp", "expt_tp", "tp_ep", "dp", "dp_cp", "expt_dp")
ROLES += ("tp_cp", "tp_dp_cp", "mp", "tp_ep_pp", "intra_dp_cp", "intra_expt_dp")


class Recorder(TorchDispatchMode):
    """
    Attributes:
        live: bytes of the storages made inside and not yet freed.
        peak: the most they were since `rebase`.
        kernels: since the beginning, in the order of their launch.
    """

    def __init__(self, pg: ProcessGroupCollection, encoder: EncoderGroups | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.kernels: list[Kernel] = []
        self._repeating = False
        self._answer: float | None = None
        self._device = platform.device().type
        self._sizes: dict[int, tuple[int, weakref.ref]] = {}
        held = {role: getattr(pg, role, None) for role in ROLES}
        if encoder is not None:
            held |= {"owners": encoder.owners, "encoder_dp": encoder.pg.dp}
        self._groups: dict[str, ProcessGroup] = {}
        self._roles: dict[str, str] = {}
        for role, group in held.items():
            if isinstance(group, ProcessGroup) and group.group_name not in self._roles:
                self._roles[group.group_name], self._groups[role] = role, group

    def groups(self) -> dict[str, tuple[int, ...]]:
        """The ranks of every group, by role."""
        ranks = dist.get_process_group_ranks
        return {role: tuple(ranks(group)) for role, group in self._groups.items()}

    def rebase(self) -> int:
        """Begins a new peak here; returns the bytes that are live."""
        self.peak = self.live
        return self.live

    @property
    def work(self) -> Work:
        """All kernels together."""
        return Work.of(self.kernels)

    def add(self, flops: int = 0, moved: int = 0, again: int = 0, fp32: bool = False) -> None:
        """Adds a kernel that no operation shows."""
        self._append(Kernel(flops, moved, again=again, fp32=fp32))

    def wait(self) -> None:
        """Adds a wait of the host that no operation shows."""
        self.kernels.append(Kernel(launched=False, waits=True))

    def _append(self, kernel: Kernel) -> None:
        self.kernels.append(kernel._replace(again=kernel.flops) if self._repeating else kernel)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Inside, every product is one that the forward pass has done before."""
        before, self._repeating = self._repeating, True
        try:
            yield
        finally:
            self._repeating = before

    @contextmanager
    def answering(self, number: float) -> Iterator[None]:
        """Inside, every number that the host reads of a tensor without memory is this one."""
        before, self._answer = self._answer, number
        try:
            yield
        finally:
            self._answer = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        out = self._answered(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs.values()))}
        made = [t for t in tensors(out) if t.untyped_storage()._cdata not in known]
        for tensor in made:
            self._keep(tensor.untyped_storage())
        kernel = kernel_of(func, args, kwargs, out, made, self._device)
        if kernel is not None:
            self._append(kernel)
        return out

    def _answered(self, func, args, kwargs) -> float | torch.Tensor | None:
        """Returns what the host reads of a tensor without memory; None if it reads nothing."""
        asked = next(iter(args), None)
        if self._answer is None or not isinstance(asked, torch.Tensor) or not asked.is_meta:
            return None
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and target.type == "cpu":
            return torch.full(asked.shape, self._answer, dtype=asked.dtype, device="cpu")
        return None

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
                given = sum(map(size, tensors(args[place])))
                self.kernels.append(Kernel(moved=given, link=link))
        elif name not in _SILENT:
            raise NotImplementedError(f"the recorder knows no collective {name}")
        if not any(tensor.is_meta for tensor in tensors(args)):
            return func(*args, **kwargs)
        work = torch._C._distributed_c10d.FakeWork().boxed()
        return work if name in _ONLY_WORK else (args[0], work)
