"""Converts the forms of a row to one.

The rest of the package knows one form: `messages`, `tools`, `images` (each a path or the bytes of a
file), and for evaluation `ground_truth`, `skill`, `form`, `scorer`. Rows in verl's form (`prompt`,
`images`, `data_source`, `reward_model`, `extra_info`) are converted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_mm.errors import DataError

Row = dict[str, Any]


def check_columns(columns: Iterable[str], where: str) -> None:
    """Checks that rows with these columns can hold a conversation.

    Raises:
        DataError: neither "messages" nor "prompt" is among them.
    """
    columns = list(columns)
    if "messages" not in columns and "prompt" not in columns:
        raise DataError(
            f"{where}: 0 of the columns 'messages' and 'prompt' among {len(columns)} "
            f"({', '.join(columns[:8])}); rename the column that holds the conversation"
        )


def normalise_row(row: Row, where: str) -> Row:
    """Returns `row` in our form; other keys are kept. `messages.py` checks the messages later.

    A number as `ground_truth` becomes text, because answers are text.

    Raises:
        DataError: an image is neither a path nor bytes, or a row has both `image` and `images`.
    """
    verl = row.get("messages") is None and row.get("prompt") is not None
    row = _from_verl(row, where) if verl else dict(row)
    reward = row.get("reward_model")
    if row.get("ground_truth") is None and isinstance(reward, dict):
        row["ground_truth"] = reward.get("ground_truth")
    truth = row.get("ground_truth")
    if isinstance(truth, (int, float)) and not isinstance(truth, bool):
        row["ground_truth"] = str(truth)
    image = row.pop("image", None)
    if image is not None:
        if row.get("images"):
            raise DataError(
                f"{where}: {len(row['images'])} 'images' and an 'image'; list all under 'images'"
            )
        row["images"] = image if isinstance(image, list) else [image]
    images = row.get("images")
    if isinstance(images, list) and any(not isinstance(image, str) for image in images):
        row["images"] = [_image(i, n, where) for n, i in enumerate(images, start=1)]
    return row


def _from_verl(row: Row, where: str) -> Row:
    """Renames verl's keys. The answer, if there is one, is the prompt's last message or a text
    `response`."""
    row = dict(row)
    messages, response = row.pop("prompt"), row.pop("response", None)
    if response is not None:
        if not isinstance(response, str) or not isinstance(messages, list):
            raise DataError(
                f"{where}: 'prompt' must be a list of messages and 'response' text; these are a "
                f"{type(messages).__name__} and a {type(response).__name__}"
            )
        messages = [*messages, {"role": "assistant", "content": response}]
    row["messages"] = messages
    if row.get("skill") is None and row.get("data_source") is not None:
        row["skill"] = row["data_source"]
    return row


def _image(image: Any, number: int, where: str) -> str | bytes:
    """Returns an image's path or bytes, given as such or in a struct of both as Hugging Face's
    `datasets` writes it. Bytes win."""
    held = image
    if isinstance(held, dict):
        held = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(held, (str, bytes)):
        return held
    keys = f" with the keys {', '.join(map(str, image))}" if isinstance(image, dict) else ""
    raise DataError(
        f"{where}: image {number} is of type {type(image).__name__}{keys}; use a path, bytes or "
        "{'bytes': ..., 'path': ...}"
    )
