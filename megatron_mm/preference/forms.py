"""Brings rows of preference pairs to the rows of their two sides.

TRL            prompt: a text or messages; or what both sides begin with
               chosen, rejected: texts or messages
ms-swift       messages: the prompt and the chosen answer
               rejected_response or rejected_messages: the other
LLaMA-Factory  conversations, messages, or instruction (with input, system, history)
               chosen, rejected: turns or texts
InternVL       question, chosen, rejected: texts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from megatron_mm.data.files.forms import Row, held_images, unlearnt
from megatron_mm.data.messages import IMAGE_MARK
from megatron_mm.errors import DataError

PROMPTS = ("messages", "prompt", "conversations", "instruction", "question")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
# The words for roles of conversations as ShareGPT writes them.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

Turns = list[dict[str, Any]]


def rows_of_sides(row: Mapping[str, Any], where: str) -> tuple[Row, Row]:
    """Returns the rows of the chosen and of the rejected side, in our form. Their prompts are the
    same, and nothing in them is learnt.

    Args:
        row: as the files' readers give it: in any form of the module's table.

    Raises:
        DataError: it has none of these forms, or its sides are empty, equal, or answer different
            prompts or images.
    """
    rest = {key: value for key, value in row.items() if value is not None}
    wanted = [key for key in REJECTED if key in rest]
    if len(wanted) != 1 or ("chosen" not in rest and "messages" not in rest):
        there = [key for key in ("chosen", *REJECTED) if key in rest]
        raise DataError(
            f"{where}: {len(there)} sides of a pair ({', '.join(there) or 'none'}); a pair has "
            f"'chosen', or 'messages' that end with it, and one of {', '.join(REJECTED)}"
        )
    images = rest.get("images") or []
    _check_images(rest.pop("rejected_images", None), images, where)
    rejected = _turns(rest.pop(wanted[0]), wanted[0], "assistant", where)
    chosen = None
    if "chosen" in rest:
        chosen = _turns(rest.pop("chosen"), "chosen", "assistant", where)
    prompt = _prompt(rest, len(images), where)
    if chosen is None:  # the conversation ends with it
        if not prompt or prompt[-1].get("role") != "assistant":
            raise DataError(f"{where}: 'messages' ends without the answer that is the chosen side")
        prompt, chosen = prompt[:-1], prompt[-1:]
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are equal; drop the row")
    prompt, sides = _parted(prompt, [chosen, rejected], where)
    before = [*map(unlearnt, prompt)]
    better, worse = (rest | {"messages": [*before, *side]} for side in sides)
    return better, worse


def _parted(prompt: Turns, sides: Sequence[Turns], where: str) -> tuple[Turns, list[Turns]]:
    """Returns the prompt and what each side adds to it. A side may hold the whole conversation."""
    whole = [bool(side) and side[0].get("role") != "assistant" for side in sides]
    if all(whole) or (whole[1] and not whole[0] and prompt):
        full = [side if of else [*prompt, *side] for side, of in zip(sides, whole, strict=True)]
        same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*full, strict=False)))
        said = [turn.get("content") for turn in full[0][:same]]
        if any(turn.get("content") not in said for turn in prompt):
            raise DataError(
                f"{where}: the sides part at message {same + 1}, before the {len(prompt)} of the "
                "prompt end; both must answer the same prompt"
            )
        prompt, sides = full[0][:same], [side[same:] for side in full]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side:
            raise DataError(f"{where}: the {name} side is empty; a pair needs two answers")
        if side[0].get("role") != "assistant":
            raise DataError(
                f"{where}: the {name} side goes on with a turn of the role "
                f"{side[0].get('role')!r}; both sides must begin with an answer to the same prompt"
            )
    if not prompt or prompt[-1].get("role") == "assistant":
        what = "is empty" if not prompt else "ends with an answer"
        raise DataError(f"{where}: the prompt {what}; end it with what the sides answer")
    return prompt, [*sides]


def _prompt(rest: Row, images: int, where: str) -> Turns:
    """Takes the prompt out of a row; none if the sides hold it."""
    given = [key for key in PROMPTS if key in rest]
    if len(given) > 1:
        raise DataError(
            f"{where}: {len(given)} keys for the prompt of a pair ({', '.join(given)}); keep one"
        )
    if not given:
        return []
    (key,) = given
    value, before = rest.pop(key), []
    if key in ("instruction", "conversations"):  # LLaMA-Factory's
        if system := rest.pop("system", None):
            before = _turns(system, "system", "system", where)
        for asked, answer in rest.pop("history", None) or []:
            before += _turns(asked, "history", "user", where)
            before += _turns(answer, "history", "assistant", where)
    if key == "instruction" and (more := rest.pop("input", None)):
        value = f"{value}\n{more}"
    if key == "question" and isinstance(value, str) and IMAGE_MARK not in value:
        value = f"{IMAGE_MARK}\n" * images + value  # as InternVL reads it
    return before + _turns(value, key, "user", where)


def _turns(value: Any, key: str, role: str, where: str) -> Turns:
    """Returns messages from a text that has the role, a turn, or a list of turns."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: {key!r} is an empty text; write it or drop the row")
        return [{"role": role, "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(
            f"{where}: {key!r} is a {type(value).__name__}; write a text, a message or a list of "
            "messages"
        )
    if not turns:
        raise DataError(f"{where}: {key!r} is an empty list; a pair needs a prompt and two answers")
    return [_turn(turn, f"{where}: turn {n} of {key!r}") for n, turn in enumerate(turns, start=1)]


def _turn(turn: dict[str, Any], at: str) -> dict[str, Any]:
    """Returns a turn as a message, without keys that have no value."""
    turn = {key: value for key, value in turn.items() if value is not None}
    if "from" not in turn:
        return turn
    speaker, text = turn["from"], turn.get("value")
    if speaker not in SPEAKERS or set(turn) != {"from", "value"}:
        raise DataError(
            f"{at} is from {speaker!r} with the keys {', '.join(turn)}; allowed: 'from' "
            f"({', '.join(SPEAKERS)}) and 'value', else write messages with 'role' and 'content'"
        )
    return {"role": SPEAKERS[speaker], "content": text}


def _check_images(rejected: Any, images: Sequence[Any], where: str) -> None:
    """Checks that the rejected side has no images of its own."""
    if not rejected:
        return
    given = held_images(rejected if isinstance(rejected, list) else [rejected], where)
    if given != [*images]:
        raise DataError(
            f"{where}: {len(given)} 'rejected_images' are not the {len(images)} 'images'; both "
            "sides of a pair must show the same"
        )
