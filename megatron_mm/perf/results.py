"""Files that a command writes when it is done; whether it can is known before it begins."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_mm.errors import ConfigError


def check_writable(path: Path | None, flag: str) -> None:
    """Makes the folder of a file that is to be written; None: there is none.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be written: {error.strerror}; allowed: a file in a folder that "
            "can be written"
        ) from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes values to a file that can be written."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
