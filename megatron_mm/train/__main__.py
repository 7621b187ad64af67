"""python -m megatron_mm.train --config FILE [--flag value ...], alone or under torchrun."""

from __future__ import annotations

import logging
import sys

from megatron_mm import cli


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if the run failed; 2 for wrong settings."""
    cli.setup_logging(cli.rank())
    logger = logging.getLogger(__name__)
    from megatron_mm.config import ConfigError, load, validate
    from megatron_mm.config.vision_parallel import chosen, decided

    try:
        run = load(None, argv)
        validate(run, cli.world_size())
        if run.parallel.vision_parallel is None and run.model.vision is not None:
            logger.info("images are encoded by the %s: %s", *chosen(run))
        run = decided(run)
    except ConfigError as error:
        return cli.fail(error)

    from megatron_mm import platform

    platform.end_with_parent()
    platform.quiet()
    try:
        platform.install()
    except RuntimeError as error:
        logger.error("%s", error)  # perhaps on this node alone
        return 1

    from megatron_mm.engine.kernels import choose_kernels
    from megatron_mm.errors import CheckpointError, DataError, NonFiniteError
    from megatron_mm.parallel import groups
    from megatron_mm.train.loop import train

    status = 0
    try:
        choose_kernels(run)
    except ConfigError as error:
        return cli.fail(error)
    groups.start(run.parallel)
    try:
        train(run, groups.build(run.parallel))
    except (CheckpointError, ConfigError, DataError, NonFiniteError) as error:
        status = cli.fail(error)
    # Not after anything else: other ranks may be inside a collective, and leaving the job in
    # good order would wait for them before the traceback is seen.
    groups.stop()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
