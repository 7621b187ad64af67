#!/usr/bin/env python
"""torchrun, with one line for each way in which a job does not come together.

    python tools/launch.py --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d \\
        --rdzv-endpoint HOST:PORT --rdzv-id JOB -m megatron_mm.train --config FILE

Every argument is torchrun's. Exit code 0 if all ranks did what they were asked, 1 if not; then
nothing that it started is left running.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.run import get_args_parser, run


def _why(error: Exception, args) -> str:
    where = f"rendezvous {args.rdzv_id!r} at {args.rdzv_endpoint or 'this machine'}"
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"{where}: not all of {args.nnodes} nodes came in time; start the same command on each "
            "of them, with one --rdzv-id and --rdzv-endpoint, or change --nnodes (the time is "
            "join_timeout in --rdzv-conf, in seconds)"
        )
    if isinstance(error, RendezvousConnectionError):
        return (
            f"{where} cannot be reached; name a host of this job in --rdzv-endpoint, and a port "
            "that is free there and open between the nodes"
        )
    if isinstance(error, RendezvousClosedError):
        return f"{where} is over: the job has ended on another node; see its output"
    if isinstance(error, RendezvousError):
        return f"{where}: {' '.join(str(error).split())}"
    if isinstance(error, ChildFailedError):
        rank, first = error.get_first_failure()
        node = f"{first.exitcode}" if first.exitcode >= 0 else f"signal {-first.exitcode}"
        return f"rank {rank} on this node ended first, with exit code {node}; its output says why"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main(argv: list[str]) -> int:
    # Its own notices are of many lines, and what matters of them is said here.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    args = get_args_parser().parse_args(argv)
    try:
        run(args)
    except SignalException as error:
        print(f"error: stopped by signal {error.sigval}", file=sys.stderr)
        return 1
    except (ChildFailedError, RendezvousError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {_why(error, args)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
