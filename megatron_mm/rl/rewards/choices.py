"""The reward `multiple_choice`: right options by letter, number or text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_mm.evaluation.final_answer import normal_text, plain
from megatron_mm.rl.rewards.letters import LISTED, Choice, chosen, read_choice
from megatron_mm.rl.rewards.text import Values, text_of, truth_text

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def multiple_choice(
    completions,
    ground_truth,
    prompts=None,
    options=None,
    choices=None,
    *,
    first: int = 1,
    **columns,
) -> Values:
    """Returns 1 if the completion chooses what the truth names, no more and no less, else 0.

    The choice stands in the final answer (`final_answer`): a mark, or "the answer is B". Without
    one it is the letter that opens the text ("B", "(B) Paris", "B. Paris"), that is called right
    ("B is correct") or picked ("I choose B", "so B"), that stands alone on the last line, or the
    only letter in brackets of the last sentence that is not excluded. "A or B" and a list of the
    options choose nothing. A and I before another word are English words. Letters in the reason
    ("B, because A is too small") choose nothing.

    The truth is a letter ("B", "(b)", "b.", "B. Paris"), several ("AC", "A, C", ["A", "C"]), the
    number of an option, counted from `first`, or an option's text. Texts of the options come from
    the row's column `options` or `choices` (a list, or an object by letter), else from the lines
    "A. ..." of the question. A letter beside the text of another option is wrong.

    Raises:
        ValueError: the truth names no option; or it is a text, and the completion names a letter
            whose text is known nowhere.
    """
    rewards: Values = []
    for i, (completion, truth) in enumerate(zip(completions, ground_truth, strict=True)):
        if truth is None:
            rewards.append(None)
            continue
        given = next((of[i] for of in (options, choices) if of and of[i] is not None), None)
        texts = _options(given, prompts[i] if prompts else None)
        rewards.append(float(_is_right(chosen(text_of(completion)), truth, texts, first)))
    return rewards


def _options(given: Any, prompt: Any) -> dict[str, str]:
    """Returns the normalised text of every option by its letter; empty if they are not known."""
    if isinstance(given, Mapping):
        return {str(key).strip().upper(): normal_text(str(text)) for key, text in given.items()}
    if given is not None and not isinstance(given, str) and len(given) <= 26:
        texts = [text_of_option(str(text)) for text in given]
        return dict(zip(_ALPHABET, texts, strict=False))
    asked = text_of(prompt[-1:] if isinstance(prompt, list) else prompt) if prompt else ""
    found = {letter: normal_text(text) for letter, text in LISTED.findall(asked)}
    in_order = [*found] == [*_ALPHABET[: len(found)]]
    return found if in_order and len(found) > 1 else {}


def text_of_option(text: str) -> str:
    """Returns an option's normalised text, without a letter of its own ("A. Paris")."""
    return normal_text(re.sub(r"^\s*(?:\([A-Z]\)|[A-Z][.):])\s+", "", text))


def _is_right(choice: Choice, truth: Any, texts: Mapping[str, str], first: int) -> bool:
    letters, number, text = _truth(truth, texts, first)
    if not letters:
        if choice.letters and not choice.text:
            raise ValueError(
                f"ground_truth {truth!r} is a text and the completion chooses "
                f"{', '.join(sorted(choice.letters))}, but the row says nowhere what that is; "
                "add a column `options`, or make ground_truth a letter"
            )
        return choice.text == text
    if len(choice.letters) == 1 and texts and not choice.letters <= texts.keys():
        choice = Choice(text="".join(choice.letters).lower())  # no letter here: a text such as x
    if choice.letters:
        alone = next(iter(choice.letters)) if len(choice.letters) == 1 else ""
        others = {other for letter, other in texts.items() if letter != alone}
        contradicts = choice.text in others and choice.text != texts.get(alone)
        return choice.letters == letters and not (alone and choice.text and contradicts)
    if choice.text and texts:
        named = {letter for letter, other in texts.items() if other == choice.text}
        if named:
            return len(letters) == 1 and letters <= named
    if choice.number is not None and (choice.worded or number is not None):
        return letters == {_letter(choice.number, first, texts)}
    return False


def _truth(
    truth: Any, texts: Mapping[str, str], first: int
) -> tuple[frozenset[str], int | None, str]:
    """Returns the letters that a truth names and its number, if it is one; for a text whose letter
    is not known no letters, and the text."""
    if isinstance(truth, (list, tuple, set)) and truth:
        several = [_truth(one, texts, first)[0] for one in truth]
        if all(several):
            return frozenset[str]().union(*several), None, ""
    if isinstance(truth, (str, int, float)) and str(truth).strip():
        written = truth_text(truth)
        text = text_of_option(written)
        named = {letter for letter, other in texts.items() if other in (normal_text(written), text)}
        letters = _lettered(written)
        if letters and not letters - (texts.keys() or letters):
            return letters, None, text
        if named:
            return frozenset(named), None, text
        if written.strip().isdecimal():
            letter = _letter(int(written), first, texts)
            if letter is None:
                raise ValueError(
                    f"ground_truth {truth!r} is no option: {len(texts) or 26} options count from "
                    f"{first}; set multiple_choice(first=0) if yours count from 0"
                )
            return frozenset({letter}), int(written), text
        if not texts and text:
            return frozenset(), None, text
    known = f"; the options are {', '.join(texts)}" if texts else ""
    raise ValueError(f"ground_truth {truth!r} names no option{known}")


def _lettered(truth: str) -> frozenset[str]:
    """Returns the letters of a truth that names some: "B", "(b)", "B. Paris", "A and C"."""
    choice = read_choice(plain(truth))
    beside = re.match(r"\s*(?:\([A-Za-z]\)|[A-Z][.:)])\s", truth)
    return choice.letters if not choice.text or beside else frozenset()


def _letter(number: int, first: int, texts: Mapping[str, str]) -> str | None:
    """Returns the letter of an option's number; None if there is no such option."""
    place = number - first
    return _ALPHABET[place] if 0 <= place < (len(texts) or len(_ALPHABET)) else None
