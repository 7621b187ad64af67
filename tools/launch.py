#!/usr/bin/env python
"""torchrun with one-line errors for jobs that do not come together.

    python tools/launch.py --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d \\
        --rdzv-endpoint HOST:PORT --rdzv-id JOB -m megatron_mm.train --config FILE

All arguments are torchrun's. The exit code is 0 if all ranks succeeded, 2 for a wrong setting, else
1; no process is left running. After a signal ranks have STOP_TIMEOUT seconds to save (30, as
torchrun gives).
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mm.parallel.descriptors import raise_limit  # noqa: E402
from megatron_mm.train.__main__ import STOPPED_BY_ANOTHER  # noqa: E402

SIGNALS = "PET_SIGNALS_TO_HANDLE"  # torchrun's --signals-to-handle, which it has no name for
PATIENCE = "STOP_TIMEOUT"
CPP_LOG = "TORCH_CPP_LOG_LEVEL"  # read when torch is loaded


def _why(error: Any, args: Namespace) -> str:
    where = f"rendezvous {args.rdzv_id!r} at {args.rdzv_endpoint or 'this machine'}"
    text = " ".join(str(error).split())
    match type(error).__name__:
        case "RendezvousTimeoutError":
            return (
                f"{where}: not all of {args.nnodes} nodes came in time; start the same command on "
                "each of them, with one --rdzv-id and --rdzv-endpoint, or change --nnodes (the "
                "time is join_timeout in --rdzv-conf, in seconds)"
            )
        case "RendezvousConnectionError":
            return (
                f"{where} cannot be reached, or the node that held it is gone; name a host of this "
                "job in --rdzv-endpoint, and a port that is free there and open between the nodes"
            )
        case "RendezvousClosedError":
            return f"{where} is over: the job has ended on another node; see its output"
        case "ChildFailedError":
            rank, first = error.get_first_failure()
            if first.exitcode == STOPPED_BY_ANOTHER:
                return "another node was told to stop, and this one has used up its --max-restarts"
            code = first.exitcode if first.exitcode >= 0 else f"signal {-first.exitcode}"
            return f"rank {rank} on this node ended first, with exit code {code}; it has said why"
        case "SignalException":
            return f"stopped by signal {error.sigval}"
        case name:
            return f"{name}: {text}"


def _patient(agent: type, seconds: int) -> type:
    """Returns torchrun's agent, which waits so long for its ranks when a signal stops the job. Its
    own 30 seconds stay for ranks that are ended because another one failed."""
    from torch.distributed.elastic.multiprocessing import SignalException

    class Patient(agent):
        def _shutdown(self, *signals) -> None:
            if self._pcontext and isinstance(sys.exception(), SignalException):
                self._pcontext.close = partial(self._pcontext.close, timeout=seconds)
            super()._shutdown(*signals)

    return Patient


def main(argv: list[str]) -> int:
    # torchrun's own messages have many lines; `_why` replaces them. Those of the ranks stay.
    # Without it an agent dies of SIGUSR1, and its ranks with it; with it, it hands it on.
    os.environ.setdefault(SIGNALS, "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    given = os.environ.get(CPP_LOG)
    os.environ[CPP_LOG] = given or "FATAL"
    from torch.distributed.launcher import api
    from torch.distributed.run import get_args_parser, run

    # Agents that share one store publish their address only in the first round, so a node that
    # comes back would wait for it for ever (torch 2.11, dynamic_rendezvous.py).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if given is None:
        del os.environ[CPP_LOG]
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    args = get_args_parser().parse_args(argv)
    patience = os.environ.get(PATIENCE, "30")
    if not patience.isdecimal():
        print(f"error: {PATIENCE} is {patience!r}; allowed: whole seconds", file=sys.stderr)
        return 2
    api.LocalElasticAgent = _patient(api.LocalElasticAgent, int(patience))
    raise_limit()  # an agent holds a connection to every rank of the job
    try:
        run(args)
    except Exception as error:  # of any kind: it ends the job on this node
        print(f"error: {_why(error, args)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
