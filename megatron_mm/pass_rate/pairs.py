"""Preference pairs of a rated row's right and wrong completions: correctness pairs, as InternVL's
`mmpr_data_pipeline_correctness_postprocess.py` makes them for MPO (arXiv 2411.10442, section 3.1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mm.data.chat import answer_text
from megatron_mm.data.files.forms import Row
from megatron_mm.data.messages import ESCAPED_MARK, IMAGE_MARK, Message
from megatron_mm.data.tokenizer import SPECIAL_TOKENS
from megatron_mm.errors import DataError
from megatron_mm.pass_rate.output import NewFiles
from megatron_mm.pass_rate.rated import Rated, check_images_beside, line_of, read_rated
from megatron_mm.preference.forms import rows_of_sides

MOST = 15  # pairs of a question, as InternVL takes
# Keys of a row that a pair keeps, besides its prompt. Labels of the row's own answer are not its.
KEPT = ("tools", "images", "skill", "form", "ground_truth", "scorer")


def write_pairs(
    data: Path, out: Path, most: int, unfinished: bool, columns: Sequence[str] = ()
) -> str:
    """Writes the pairs of all rows, and says how many and what was left out.

    Args:
        most: pairs of a question; unfinished: whether completions that were cut at the length limit
            may be sides.
        columns: further keys of the rows to keep.
    Raises:
        DataError: for a file that cannot be read or written, a row that is not rated, or no pair.
    """
    count: Counter = Counter()
    unfit = ""
    with NewFiles([out]) as files:
        for row in read_rated(data):
            check_images_beside(row.row, row.where, data.parent, out)
            right, wrong = sides(row, unfinished, count)
            made = [*pair_up(right, wrong)]
            count["rows"] += 1
            count["rows with pairs"] += bool(made)
            count["above"] += max(0, len(made) - most)
            for chosen, rejected in made[:most]:
                try:
                    pair = pair_row(row.bare, chosen, rejected, row.where, columns)
                    line = line_of(pair, row.where)
                except DataError as problem:  # a prompt that training takes and DPO does not
                    count["unfit"] += 1
                    unfit = unfit or f" (the first: {problem})"
                else:
                    files.add(out, line)
        if not files.lines[out]:
            raise DataError(
                f"{data}: 0 pairs of {count['rows']} rows; a row needs a right and a wrong "
                f"completion ({count['unfinished']} are unfinished, see --unfinished; training "
                f"could not read {count['unfit']} pairs{unfit})"
            )
    return (
        f"{out}: {files.lines[out]} pairs of {count['rows with pairs']} of {count['rows']} rows; "
        f"left out: {count['unfinished']} unfinished completions, {count['repeated']} repeated, "
        f"{count['unusable']} empty or with a control token, {count['above']} pairs above {most} a "
        f"row, {count['unfit']} that training could not read{unfit}"
    )


def sides(row: Rated, unfinished: bool, count: Counter) -> tuple[list[str], list[str]]:
    """Returns the right and the wrong texts of a row, each once, in their order. `count` learns
    what was left out."""
    found: dict[str, bool] = {}
    for text, finished, right in zip(row.completions, row.finished, row.right, strict=True):
        if right is None:
            continue
        answer = answer_of(text)
        if not finished and not unfinished:
            # An end that never came: such a wrong side would teach that long is wrong.
            count["unfinished"] += 1
        elif answer is None:
            count["unusable"] += 1
        elif answer in found:
            count["repeated"] += 1
            found[answer] |= right  # a side that was ever right is never the wrong one
        else:
            found[answer] = right
    return [t for t, good in found.items() if good], [t for t, good in found.items() if not good]


def answer_of(text: str) -> str | None:
    """Returns the text of a completion as training would encode it; None if a row may not hold it:
    nothing is left of it, or it spells a token that the template writes."""
    answer = answer_text(Message("assistant", (text,)))
    if not answer.strip() or any(token in answer for token in SPECIAL_TOKENS.values()):
        return None
    return answer


def pair_up(right: Sequence[str], wrong: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields every pair of a right and a wrong text, so that any first few use each text about as
    often: the longer list is gone through again and again, beside the shorter one, which is shifted
    by one each time."""
    if not right or not wrong:
        return
    longer, shorter = (right, wrong) if len(right) >= len(wrong) else (wrong, right)
    for shift in range(len(shorter)):
        for place, text in enumerate(longer):
            other = shorter[(place + shift) % len(shorter)]
            yield (text, other) if longer is right else (other, text)


def pair_row(row: Row, chosen: str, rejected: str, where: str, columns: Sequence[str] = ()) -> Row:
    """Returns a row of TRL's form for `objective: dpo`.

    Args:
        row: that the answers belong to; its own last answer is not kept.
    Raises:
        DataError: it is no pair that training could read.
    """
    messages = row["messages"]
    if messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    escaped = [text.replace(IMAGE_MARK, ESCAPED_MARK) for text in (chosen, rejected)]
    pair: Row = {"prompt": messages, "chosen": escaped[0], "rejected": escaped[1]}
    pair |= {key: row[key] for key in (*KEPT, *columns) if row.get(key) is not None}
    rows_of_sides(pair, where)
    return pair
