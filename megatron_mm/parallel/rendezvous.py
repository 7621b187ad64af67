"""Whether a job's nodes have met before, so that a node that comes back joins them at once.

    python -m megatron_mm.parallel.rendezvous HOST:PORT JOB

ends with 0 if torchrun's agents have opened rendezvous JOB in the store at HOST:PORT, else with 1.
A check of all nodes together would wait for those that train already.
"""

from __future__ import annotations

import datetime
import sys

import torch.distributed as dist

WAIT = datetime.timedelta(seconds=3)  # for the store, of which the host may not be up yet


def begun(endpoint: str, job: str) -> bool:
    """Returns whether a rendezvous of torchrun's c10d backend has a state."""
    host, _, port = endpoint.rpartition(":")
    try:
        store = dist.TCPStore(host.strip("[]"), int(port), is_master=False, timeout=WAIT)
        return store.check([f"torch.rendezvous.{job}"])  # c10d_rendezvous_backend.py
    except (RuntimeError, ValueError):  # nobody is there, or the endpoint is none
        return False


if __name__ == "__main__":
    sys.exit(not begun(*sys.argv[1:]))
