"""python -m megatron_mm.train --config FILE [--flag value ...], alone or under torchrun."""

from __future__ import annotations

import os
import sys


def main(argv: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    from megatron_mm.config import ConfigError, load, validate

    try:
        run = load(None, argv)
        validate(run, int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2

    from megatron_mm import platform

    platform.end_with_parent()
    platform.quiet()
    try:
        platform.install()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    from megatron_mm.errors import CheckpointError, DataError, NonFiniteError
    from megatron_mm.parallel import groups
    from megatron_mm.train.loop import train

    status = 0
    groups.start(run.parallel)
    try:
        train(run, groups.build(run.parallel))
    except (CheckpointError, ConfigError, DataError, NonFiniteError) as error:
        # These are raised on every rank together, so one of them speaks.
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        status = 1
    # Not after anything else: other ranks may be inside a collective, and leaving the job in
    # good order would wait for them before the traceback is seen.
    groups.stop()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
