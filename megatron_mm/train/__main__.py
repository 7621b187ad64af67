"""python -m megatron_mm.train --config FILE [--flag value ...], alone or under torchrun."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from megatron_mm import cli

if TYPE_CHECKING:
    from megatron_mm.config import RunConfig

# The exit code of a rank that saved and left because ranks elsewhere were told to: its agent starts
# it again, and it goes on once they are back. The agents of those that were told end anyway.
STOPPED_BY_ANOTHER = 75  # EX_TEMPFAIL of sysexits.h


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if the run failed; 2 for wrong settings; STOPPED_BY_ANOTHER."""
    cli.setup_logging(cli.rank())
    from megatron_mm import platform

    # Before the settings: a plug-in, or an objective of one's own, may import megatron-core.
    platform.end_with_parent()
    platform.quiet()
    try:
        platform.install()
    except RuntimeError as error:
        cli.logger.error("%s", error)  # perhaps on this node alone
        return 1

    from megatron_mm.config import ConfigError, load, validate
    from megatron_mm.config.vision_parallel import chosen, decided

    try:
        run = load(None, argv)
        validate(run, cli.world_size())
        if run.parallel.vision_parallel is None and run.model.vision is not None:
            cli.logger.info("images are encoded by the %s: %s", *chosen(run))
        run = decided(run)
    except ConfigError as error:
        return cli.fail(error, joined=False)

    from megatron_mm.engine.kernels import choose_kernels
    from megatron_mm.errors import LaunchError
    from megatron_mm.parallel import groups

    try:
        choose_kernels(run)
        groups.start(run.parallel)
    except (ConfigError, LaunchError) as error:
        return cli.fail(error, joined=False)
    status = _run(run)
    cli.let_go()
    return status


def _run(run: RunConfig) -> int:
    """Trains in the job that has been started; returns the exit code."""
    from megatron_mm.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DivergedError,
        NonFiniteError,
    )
    from megatron_mm.parallel import groups
    from megatron_mm.parallel.watch import Watch, lost_connection, store_of_the_job
    from megatron_mm.train.alike import check_alike
    from megatron_mm.train.loop import train
    from megatron_mm.train.stopping import stopping

    told, status = (CheckpointError, ConfigError, DataError, DivergedError, NonFiniteError), 0
    watched = None
    if cli.world_size() > 1:  # alone there is no one to watch
        try:
            watched = Watch(store_of_the_job(), cli.rank(), cli.world_size())
        except RuntimeError as error:
            cli.logger.warning("ranks are not watched: %s", cli.one_line(error))
    with watched or nullcontext():
        try:
            check_alike(run)
            trainer = train(run, groups.build(run.parallel))
            if trainer.stopped_by_another:
                cli.logger.info("another node was told to stop; this one may go on with it later")
                status = STOPPED_BY_ANOTHER
        except told as error:
            status = cli.fail(error)
        except KeyboardInterrupt:
            return 130
        except BaseException as error:
            if watched is None:
                raise
            said = lost_connection(error)
            with stopping(lambda: None):  # torchrun tells this rank to end meanwhile
                why = said and watched.why(said)
            if not why:  # its own failure, or one that nothing explains but its traceback
                watched.last_word(cli.one_line(error))
                raise
            cli.logger.error("%s", why)
            return 1
    # Not after anything else: other ranks may be inside a collective, and leaving the job in
    # good order would wait for them before the traceback is seen.
    groups.stop()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
