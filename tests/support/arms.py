"""Jobs of comparisons of arms, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from examples.digits.jobs import Job
from megatron_mm.config import RunConfig, load, validate


def trained(jobs: Sequence[Job]) -> Iterator[tuple[Job, RunConfig]]:
    """Yields the jobs that train, each with its run. Whatever a job needs is made before it, and
    the settings of runs hold."""
    done = [job.done for job in jobs]
    for number, job in enumerate(jobs):
        assert set(job.needs) <= set(done[:number])
        if "megatron_mm.train" not in job.command:
            continue
        config = job.command[job.command.index("--config") + 1]
        run = load(config, [*job.command[job.command.index("--output-dir") :], *job.late()])
        validate(run, 1)
        yield job, run
