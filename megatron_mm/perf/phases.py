"""Time of a step on this rank, by phase: forward, backward, each kind of communication.

`Phases` is switched on around the measured code and costs nothing elsewhere. Phases are regions of
code; communication is what torch's process groups are asked for inside them, told apart by
operation and by the group's part in the layout. A collective that is waited for counts while it is
waited for, an asynchronous one only while somebody waits: what is left is exposed communication.
Waiting for a peer that is late counts too: a pipeline's bubble stands under `pp`.

On a GPU the marks are events of the current stream, which waits for a collective as the code
does; they are read once, after the step. A captured graph can hold none of them, and its replays
do not pass here: what it communicates counts for the phase that replays it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

from megatron_mm import platform
from megatron_mm.engine.encoder import EncoderSide
from megatron_mm.parallel.groups import Groups

# Methods of torch's ProcessGroup, and the argument that holds the tensors this rank hands over.
OPERATIONS = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "allgather": ("all-gather", 1),
    "_allgather_base": ("all-gather", 1),
    "allgather_into_tensor_coalesced": ("all-gather", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "alltoall_base": ("all-to-all", 1),
    "alltoall": ("all-to-all", 1),
    "broadcast": ("broadcast", 0),
    "send": ("send/recv", 0),
    "recv": ("send/recv", None),
    "barrier": ("barrier", None),
    # The end of torch's `batch_isend_irecv`, whose operations return nothing to wait for. Coalesced
    # collectives have operations of their own, above.
    "_end_coalescing": ("send/recv", None),
}
_NO_CALLS = ("_end_coalescing",)  # it waits for calls that are counted already
# The part of the layout that a group of megatron-core's collection serves.
PARTS = {
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "ep": "ep",
    "expt_tp": "etp",
    "dp": "dp",
    "dp_cp": "dp",
    "intra_dp_cp": "dp",
    "expt_dp": "edp",
    "intra_expt_dp": "edp",
    "tp_cp": "tp x cp",
    "tp_ep": "tp x ep",
    "mp": "model",
    "tp_ep_pp": "model",
}


@dataclass
class Span:
    """Seconds come from two marks once the step is over.

    Attributes:
        inside: of another one.
        bytes: handed over by this rank.
    """

    name: str
    communication: bool
    inside: Span | None
    bytes: int = 0
    calls: int = 1
    begin: Any = None
    end: Any = None

    @property
    def seconds(self) -> float:
        if isinstance(self.begin, float):
            return self.end - self.begin
        return self.begin.elapsed_time(self.end) / 1000


def _mark() -> Any:
    if platform.device().type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _capturing() -> bool:
    on_gpu = platform.device().type == "cuda"  # torch may be built without CUDA
    return on_gpu and torch.cuda.is_current_stream_capturing()


class _Waiting:
    """A Work whose `wait` is a span of its own."""

    def __init__(self, work: Any, wait: Callable[..., Any]):
        self._work, self._wait = work, wait

    def wait(self, *args):
        return self._wait(self._work, *args)

    def __getattr__(self, name: str):
        return getattr(self._work, name)


class Phases:
    """A context: while it is on, `step` regions of this rank are taken apart."""

    def __init__(self, groups: Groups):
        self._parts: dict[str, str] = {}
        for field, part in PARTS.items():
            group = getattr(groups.pg, field, None)
            if group is not None:
                self._parts.setdefault(group.group_name, part)
        if groups.encoder is not None:
            self._parts.setdefault(groups.encoder.owners.group_name, "owners")
            self._parts.setdefault(groups.encoder.pg.dp.group_name, "encoder dp")
        self._parts[groups.world.group_name] = self._parts[groups.replica.group_name] = "control"
        self._parts[dist.group.WORLD.group_name] = "world"
        self._spans: list[Span] = []
        self._top: Span | None = None
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Phases:
        for name in OPERATIONS:
            self._replace(dist.ProcessGroup, name, self._operation(name))
        for phase in ("forward", "backward"):
            self._replace(schedules, f"{phase}_step", self._phase(phase))
        for method, phase in (("encode", "encode"), ("backward", "encode backward")):
            self._replace(EncoderSide, method, self._phase(phase))
        return self

    def __exit__(self, *_) -> None:
        while self._undo:
            owner, name, original = self._undo.pop()
            setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._undo.append((owner, name, original))
        setattr(owner, name, make(original))

    @contextmanager
    def _span(self, name: str, communication: bool, size: int = 0, calls: int = 1):
        span = Span(name, communication, self._top, size, calls)
        self._spans.append(span)
        self._top, span.begin = span, _mark()
        try:
            yield
        finally:
            span.end, self._top = _mark(), span.inside

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Times a phase. A phase inside another one (the forward passes of a rollout) counts as
        part of the outer one; `step` holds all of them."""
        inside = self._top
        if (inside is not None and inside.name != "step") or _capturing():
            yield
            return
        with self._span(name, communication=False):
            yield

    def each(self, name: str) -> list[float]:
        """Seconds of every span of that name since the last `take`, in order, communication in it
        included."""
        if platform.device().type == "cuda":
            torch.cuda.synchronize()
        return [span.seconds for span in self._spans if span.name == name]

    def take(self) -> dict[str, dict[str, float]]:
        """Sums all since the last call: seconds of each phase without its communication, `other`
        for the rest of the steps; seconds, calls and bytes of each kind of communication."""
        if platform.device().type == "cuda":
            torch.cuda.synchronize()
        own = {id(span): span.seconds for span in self._spans}
        for span in self._spans:
            if span.inside is not None:
                own[id(span.inside)] -= span.seconds
        found: dict[str, dict[str, float]] = {}
        for span in self._spans:
            name = "other" if span.name == "step" else span.name
            entry = found.setdefault(name, {"seconds": 0.0})
            entry["seconds"] += own[id(span)]
            if span.communication:
                entry["calls"] = entry.get("calls", 0) + span.calls
                entry["bytes"] = entry.get("bytes", 0) + span.bytes
        self._spans.clear()
        return found

    def _phase(self, name: str) -> Callable:
        def make(original: Callable) -> Callable:
            @wraps(original)
            def timed(*args, **kwargs):
                with self.region(name):
                    return original(*args, **kwargs)

            return timed

        return make

    def _operation(self, method: str) -> Callable:
        name, argument = OPERATIONS[method]

        def make(original: Callable) -> Callable:
            def timed(group, *args, **kwargs):
                # Nothing is sent in a group of one.
                if self._idle() or group.size() == 1:
                    return original(group, *args, **kwargs)
                kind = f"{self._parts.get(group.group_name, 'other group')} {name}"
                size = 0 if argument is None else _bytes(args[argument])
                with self._span(kind, True, size, calls=int(method not in _NO_CALLS)):
                    work = original(group, *args, **kwargs)
                return None if work is None else _Waiting(work, self._wait_for(kind))

            return timed

        return make

    def _idle(self) -> bool:
        """Whether communication is not timed here: outside of a step, inside of other
        communication, or while a CUDA graph is captured, whose events have no time."""
        return self._top is None or self._top.communication or _capturing()

    def _wait_for(self, kind: str) -> Callable:
        def wait(work: Any, *args):
            if self._idle():
                return work.wait(*args)
            with self._span(kind, True, calls=0):
                return work.wait(*args)

        return wait


def _bytes(given: Any) -> int:
    """Bytes of a tensor, or of tensors in lists."""
    if isinstance(given, torch.Tensor):
        return given.nbytes
    return sum(_bytes(one) for one in given) if isinstance(given, (list, tuple)) else 0
