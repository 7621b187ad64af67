"""Converts the forms of a row to one.

The rest of the package knows one form: `messages`, `tools`, `images` (each a path or the bytes of a
file, or an object of one of them and a box), and for evaluation `ground_truth`, `skill`, `form`,
`scorer`. Rows in verl's form (`prompt`, `images`, `data_source`, `reward_model`, `extra_info`) are
converted here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.pictures.boxes import Box, read_box

Row = dict[str, Any]
# A path, bytes, or {"path": ..., "box": [...]} or {"bytes": ..., "box": [...]}.
HeldImage = str | bytes | dict[str, Any]
# Keys that only rows of preference pairs have: preference/forms.py reads those rows.
SIDES = ("chosen", "rejected", "rejected_response", "rejected_messages")


def check_columns(columns: Iterable[str], where: str) -> None:
    """Checks that rows with these columns can hold a conversation.

    Raises:
        DataError: neither "messages" nor "prompt" is among them, nor a side of a pair.
    """
    columns = list(columns)
    if not {"messages", "prompt", *SIDES} & {*columns}:
        raise DataError(
            f"{where}: 0 of the columns 'messages' and 'prompt' among {len(columns)} "
            f"({', '.join(columns[:8])}); rename the column that holds the conversation"
        )


def from_json(value: Any, key: str, where: str) -> Any:
    """Returns the value of a key that may be given as JSON text, as columns of parquet often are.

    Raises:
        DataError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {key!r} is not JSON ({error})") from None


def to_json(value: Any, key: str, where: str) -> str:
    """Returns a key's value as JSON text. A parquet file may hold dates, bytes and others.

    Raises:
        DataError: JSON has no such value.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {key!r} cannot be written as JSON ({error})") from None


def normalise_row(row: Row, where: str) -> Row:
    """Returns `row` in our form; other keys are kept. `messages.py` checks the messages later.

    A number as `ground_truth` becomes text, because answers are text.

    Raises:
        DataError: an image is neither a path nor bytes, or its box is none; a row has both `image`
            and `images`, or two truths that differ.
    """
    pair = any(row.get(key) is not None for key in SIDES)  # whose prompt may be called that too
    verl = row.get("messages") is None and row.get("prompt") is not None and not pair
    row = _from_verl(row, where) if verl else dict(row)
    truths = [row.get("ground_truth"), _truth_of_verl(row.get("reward_model"), where)]
    known = [_as_text(truth, where) for truth in truths if truth is not None]
    if known[1:] and known[0] != known[1]:
        raise DataError(
            f"{where}: ground_truth is {known[0]!r}, reward_model.ground_truth {known[1]!r}; "
            "keep the right one"
        )
    if known:
        row["ground_truth"] = known[0]
    image = row.pop("image", None)
    if image is not None:
        if beside := row.get("images"):
            count = len(beside) if isinstance(beside, list) else 1
            raise DataError(f"{where}: {count} 'images' and an 'image'; list all under 'images'")
        row["images"] = image if isinstance(image, list) else [image]
    images = row.get("images")
    if isinstance(images, list) and any(not isinstance(image, str) for image in images):
        row["images"] = held_images(images, where)
    return row


def held_images(images: list[Any], where: str) -> list[HeldImage]:
    """Returns the path or the bytes of each image of a row, with its box if it has one. Raises
    DataError."""
    return [_image(image, number, where) for number, image in enumerate(images, start=1)]


def held_and_box(image: HeldImage) -> tuple[str | bytes, Box | None]:
    """Returns the path or the bytes of an image of `held_images`, and its box."""
    if not isinstance(image, dict):
        return image, None
    left, top, right, bottom = image["box"]
    return image["path"] if "path" in image else image["bytes"], (left, top, right, bottom)


def unlearnt(message: Any) -> Any:
    """Returns a message of a prompt, which is read and not learnt."""
    answer = isinstance(message, dict) and message.get("role") == "assistant"
    return message | {"weight": 0} if answer else message


def _from_verl(row: Row, where: str) -> Row:
    """Renames verl's keys. The answer, if there is one, is the prompt's last message or a text
    `response`; beside a response the answers of the prompt are not learnt."""
    row = dict(row)
    messages, response = row.pop("prompt"), row.pop("response", None)
    if response is not None:
        if not isinstance(response, str) or not isinstance(messages, list):
            raise DataError(
                f"{where}: 'prompt' must be a list of messages and 'response' text; these are a "
                f"{type(messages).__name__} and a {type(response).__name__}"
            )
        messages = [*map(unlearnt, messages), {"role": "assistant", "content": response}]
    row["messages"] = messages
    if row.get("skill") is None and row.get("data_source") is not None:
        row["skill"] = row["data_source"]
    return row


def _truth_of_verl(reward: Any, where: str) -> Any:
    """Returns the truth of verl's `reward_model`: an object, or its JSON; None without one."""
    reward = from_json(reward, "reward_model", where)
    return reward.get("ground_truth") if isinstance(reward, dict) else None


def _as_text(truth: Any, where: str) -> Any:
    """Returns a number as text, 7.0 as "7": a column of integers with gaps holds it so."""
    if isinstance(truth, bool) or not isinstance(truth, (int, float)):
        return truth
    if isinstance(truth, int):
        if truth.bit_length() > 1024:
            raise DataError(f"{where}: ground_truth has {truth.bit_length()} bits; write text")
        return str(truth)
    if not math.isfinite(truth):
        raise DataError(f"{where}: ground_truth is {truth}; write the answer or leave it out")
    return str(int(truth)) if truth == int(truth) else str(truth)


def _image(image: Any, number: int, where: str) -> HeldImage:
    """Returns an image's path or bytes, given as such or in a struct of both as Hugging Face's
    `datasets` writes it, there with its box if it has one. Bytes win."""
    held, box = image, None
    if isinstance(image, dict):
        more = [k for k, v in image.items() if v is not None and k not in ("bytes", "path", "box")]
        held = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        box = image.get("box")
        if held is None and box is not None:
            raise DataError(f"{where}: image {number} is a box of nothing; add its path or bytes")
        held = None if more else held
    if isinstance(held, (str, bytes)):
        if box is None:
            return held
        key = "path" if isinstance(held, str) else "bytes"
        return {key: held, "box": [*read_box(box, f"{where}: image {number}")]}
    keys = f" with the keys {', '.join(map(str, image))}" if isinstance(image, dict) else ""
    raise DataError(
        f"{where}: image {number} is of type {type(image).__name__}{keys}; use a path, bytes or "
        "{'bytes': ..., 'path': ..., 'box': ...}"
    )
