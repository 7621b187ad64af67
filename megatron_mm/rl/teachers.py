"""On-policy distillation: the teacher of each prompt. Several teachers are MOPD's (MiMo-V2-Flash,
arXiv 2601.02780, section 4; Nemotron-Cascade 2, arXiv 2603.19220). Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.rl.settings import RLConfig, teacher_folders


def teacher_of(row: Mapping[str, Any], where: str, rl: RLConfig) -> str | None:
    """Returns the name of a row's teacher; None where there are no teachers.

    Args:
        where: the row, as "file:row".

    Raises:
        DataError: the row names none of the teachers.
    """
    names = [*teacher_folders(rl)]
    if not names or rl.teacher_key is None:
        return names[0] if names else None
    name = row.get(rl.teacher_key)
    if name not in names:
        raise DataError(
            f"{where}: {rl.teacher_key} is {name!r:.80}; allowed: the name of a teacher of "
            f"teacher_load, {', '.join(names)}"
        )
    return name
