"""The frame of a command that works on a checkpoint's model: its job of ranks, its exit code."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_mm import cli, platform
from megatron_mm.config import RunConfig
from megatron_mm.errors import CheckpointError, ConfigError, DataError, LaunchError, RLError


class CheckpointCommand:
    """Use it in a `with` statement. Errors that users see end the block with one line, on rank 0
    once the ranks have joined; `status` is then the exit code: 0; 2 for wrong settings; 1 for
    anything else.

    Attributes:
        status: the exit code, once the block has ended.
    """

    def __init__(self) -> None:
        cli.setup_logging(cli.rank())
        platform.quiet()
        platform.install()
        self.status, self._started = 0, False
        self._resolved: tuple[Path, str] | None = None  # the checkpoint and its identity
        self._groups: Any = None  # of the job, once it has started

    def resolve(self, folder: str | Path) -> tuple[Path, dict[str, Any]]:
        """Returns the folder of the newest checkpoint in `folder` and what its run.json holds.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        from megatron_mm.checkpoint import folders

        try:
            path, stored = folders.resolve(Path(folder))
        except CheckpointError as error:
            raise CheckpointError(f"cannot load {folder}: {error}") from None
        self._resolved = path, stored["identity"]
        return path, stored

    def start(self, run: RunConfig) -> Any:
        """Starts the job of ranks on the layout of `run`, and returns its `parallel.groups.Groups`.
        A job that has started stays as it is.

        Raises:
            CheckpointError: on every rank, if `resolve` has found different checkpoints.
        """
        from megatron_mm.checkpoint.collective import check_same
        from megatron_mm.engine.kernels import choose_kernels
        from megatron_mm.parallel import groups

        if self._groups is None:
            choose_kernels(run)
            groups.start(run.parallel)
            self._started = True
            self._groups = groups.build(run.parallel)
            if self._resolved is not None:
                check_same(self._groups.world, *self._resolved)
        return self._groups

    def engine(self, run: RunConfig) -> Any:
        """Returns an `engine.Engine`, into which weights are to be loaded. A command may ask for
        several models, on one layout."""
        from megatron_mm.engine.engine import Engine

        return Engine.create(run, self.start(run), drawn=False)

    def __enter__(self) -> CheckpointCommand:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        shown = isinstance(error, (CheckpointError, ConfigError, DataError, LaunchError, RLError))
        if shown:
            assert isinstance(error, Exception)
            self.status = cli.fail(error, joined=self._started)
        if self._started and (shown or error is None):
            from megatron_mm.parallel import groups

            groups.stop()
        return shown
