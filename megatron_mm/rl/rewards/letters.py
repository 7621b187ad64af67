"""Reads which options a completion chooses."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_mm.evaluation.final_answer import final_answer, normal_text, plain

MAX_PICKS = 50  # "I choose", "so": those that are read, the last ones
# After A or I as a letter; before any other word they are an English article or pronoun.
_GOES_ON = (
    r"(?:because|since|as|and|or|but|not|is|are|was|which|for|due|given|rather|instead|with|where|"
    r"while|if|would|seems|fits|matches|by)\b"
)
_ITEM = re.compile(
    r"[(\[{\"'\u201c\u2018]{0,2}\s?(?:(?P<upper>[A-Z])|(?P<lower>[a-z]))(?:[)\]}]|(?=[.:,;!?)\]}/&\s\u2014\"'\u201d\u2019]|$))"
    r"(?!\.[A-Za-z])(?!['\u2019]?[A-Za-z])"
)
_RUN = re.compile(r"(?P<run>[A-H]{2,6})(?![\w'-])")
_JOIN = re.compile(r"\s?(?:,\s?(?:and|or)\b|[,;/&+]|\b(?:and|or|und)\b)\s?(?:option\s|choice\s)?")
_OTHER_CLAUSE = re.compile(
    r"\s+(?:is|was|isn't|does|doesn't|has|would|will|can|cannot|seems|looks|gives|says|fails)\b"
)
_FILLER = re.compile(
    r"\s*(?:(?:clearly|definitely|probably|most likely|likely|therefore|thus|indeed|simply|"
    r"obviously|certainly|surely|both|the|option|options|choice|letter|answer|number|statement|"
    r"i think|i believe|i'd say|i guess|i would say|it is|it's|that is|is)\b[:,]?\s*|[:\s])*",
    re.IGNORECASE,
)
_PICKED = re.compile(
    r"\b(?:let's|let us|i(?:'d| would|'ll| will| am|'m)?|my|we)\s+(?:(?:final|best)\s+)?"
    r"(?:choose|pick|select|go(?:ing)? with|chose|vote for|guess|choice|pick)\b(?:\s+is\b)?\s*:?"
    r"|\b(?:so|therefore|thus|hence)\b,?(?:\s+it(?:'s| is| must be)|\s+the answer)?"
    r"|\b(?:it(?:'s| is| must be| has to be)|letter is)\b"
    r"|\A\s*(?:answer|option|choice)\b(?!\s+I\b)|\A\s*both\b",
    re.IGNORECASE,
)
_CALLED = re.compile(
    r"(?:(?<=[\s(*])|^)[(\[]?(?P<letter>[A-Z])[)\]]?\s+(?:is|must be|seems|looks)\s+"
    r"(?:(?:clearly|definitely|probably|obviously|therefore|thus)\s+)?(?:the\s+)?(?:only\s+|most\s+)?"
    r"(?:correct|right|best|answer|true|one)\b",
    re.MULTILINE,
)
# "A and C are wrong", "Option B is too small": said of options, not a choice of them.
_DISMISSED = re.compile(
    r"\s*(?:(?:both|options?|choices?|answers?)\s+)*[(\[]?[A-Z][)\]]?"
    r"(?:\s*(?:,|\band\b|&)+\s*[(\[]?[A-Z][)\]]?)*\s+"
    r"(?:is|are|was|were|isn't|aren't|seems?|looks?|can|cannot|can't|does|doesn't|has|have)\b"
    r"(?!\s+(?:\w+ly\s+)?(?:the\s+)?(?:\w+ly\s+|only\s+|most\s+|both\s+)?"
    r"(?:correct|right|best|answers?|true|ones?)\b)",
    re.IGNORECASE,
)
_EXCLUDED = re.compile(
    r"\b(?:neither|nor|not|isn't|than|rules? out|ruled out|eliminated?|excluded?|if)\s+"
    r"(?:option\s+|choice\s+|answer\s+)?[(\[]?[A-Z][)\]]?"
)
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
LISTED = re.compile(r"^[ \t]*[(\[]?([A-Z])[)\].:]\s+(\S[^\n]*?)[ \t]*$", re.MULTILINE)
_NUMBERED = re.compile(
    r"(?P<word>(?:option|choice|number)\s+)?[(\[]?(?P<number>\d{1,2})[)\].]?\s*[.!]?"
)


_DOUBTED = re.compile(r"\b(?:if|not|whether|think|say)\s*$", re.IGNORECASE)
_OPENING = re.compile(
    r"[\s\"'\u201c*]*[(\[]?[A-Za-z][\"'\u201d*]*"
    r"(?:[)\]]|[.:](?:\s|$)|\s*$|\s*[!,;/&\u2014-]|\s+(?:because|since|and|or|as)\b)"
    r"|\s*[A-H]{2,6}\b"
)
_SAYING = re.compile(
    r"\A\s*(?:(?:i think|i believe|i'd say|so|therefore|thus),?\s+)?(?:(?:it|that)(?:'s| is)\s+)?",
    re.IGNORECASE,
)


# An option's text, then its letter: "London (B)", "London, option B".
_TRAILING = re.compile(
    r"(?P<text>[^()\[\]\n.;!?]{1,200}?)[\s,:-]*"
    r"(?:[(\[](?P<bracketed>[A-Z])[)\]]|\b(?i:option|choice)\s+[(\[]?(?P<worded>[A-Z])[)\]]?)[\s.!]*"
)
_HEDGED = re.compile(r"\b(?:or|and|not|neither|nor|isn't|than|either)\b", re.IGNORECASE)


class Choice(NamedTuple):
    """A choice that a text makes.

    Attributes:
        letters: empty if it names none, or several that "or" joins.
        number: of the option; None if it names none.
        worded: the number follows "option" or "choice".
        text: that stands beside the letter, or alone; normalised.
    """

    letters: frozenset[str] = frozenset()
    number: int | None = None
    worded: bool = False
    text: str = ""


NOTHING = Choice()


def chosen(text: str) -> Choice:
    """Returns what a completion chooses, see `multiple_choice`."""
    final = final_answer(text)
    for corrected in final.corrections:
        choice = read_choice(plain(corrected), strict=True)
        if (choice.letters or choice.number is not None) and not _DISMISSED.match(corrected):
            return choice
    if final.kind == "none":
        return _concluded(plain(final.text))
    return read_choice(plain(final.text[:500]))


def read_choice(text: str, strict: bool = False) -> Choice:
    """Returns the choice that a plain text begins with; NOTHING for "A or B".

    Args:
        strict: it is a letter or a number and nothing else counts.
    """
    text = text.strip().strip("\"'\u201c\u201d\u2018\u2019*").strip()
    number = _NUMBERED.fullmatch(text)
    if number:
        return Choice(frozenset(), int(number["number"]), bool(number["word"]), normal_text(text))
    start = _FILLER.match(text).end()  # type: ignore[union-attr]
    if re.match(r"either\b|not\b|none\b|neither\b", text[start:], re.IGNORECASE):
        return Choice(text=normal_text(text)) if not strict else NOTHING
    letters, end, hedged = _letters(text, start)
    if hedged:
        return NOTHING
    if letters:
        beside = re.match(r"\s*[.):,\-\u2014\]]*\s*([^\n]*)", text[end:])
        return Choice(letters, None, False, _own_text(beside[1] if beside else ""))
    if strict:
        return NOTHING
    trailing = _TRAILING.fullmatch(text.split("\n", 1)[0])
    if trailing and not _HEDGED.search(trailing["text"]):
        letter = trailing["bracketed"] or trailing["worded"]
        return Choice(frozenset(letter), None, False, _own_text(trailing["text"]))
    number = _NUMBERED.match(text[start:])
    if number and re.search(r"(?:option|choice|number)\s*$", text[:start], re.IGNORECASE):
        return Choice(frozenset(), int(number["number"]), True, _own_text(text[start:]))
    return Choice(text=_own_text(text))


def _own_text(text: str) -> str:
    """Returns a text up to the reason or the end of the sentence, normalised."""
    cut = re.split(r"\b(?:because|since|as it|which)\b|[.!?;](?=\s|$)|\n", text, maxsplit=1)[0]
    return normal_text(cut)


def _letters(text: str, start: int) -> tuple[frozenset[str], int, bool]:
    """Returns the letters that stand at `start`, where they end, and whether "or" or "/" joins
    them."""
    if run := _RUN.match(text, start):
        in_order = "".join(sorted(set(run["run"]))) == run["run"]
        if in_order and not re.match(r"\s+[a-z]", text[run.end() :]):
            return frozenset(run["run"]), run.end(), False
    found: list[str] = []
    end, hedged = start, False
    joined: re.Match[str] | None = None
    while item := _ITEM.match(text, joined.end() if joined else end):
        letter, after = item["upper"] or item["lower"].upper(), text[item.end() :][:40]
        bare = item[0][0] not in "([{" and item[0][-1] not in ")]}"
        word = bare and re.match(r"\s+[a-z]", after)
        if word and letter in "AI" and not re.match(rf"\s+{_GOES_ON}", after):
            break
        if item["lower"] and bare and re.match(r"\s*[A-Za-z'-]", after):
            break
        if letter == "I" and bare and start and not after.strip():
            break  # "choice I": the sentence is cut off
        if found and _OTHER_CLAUSE.match(after):
            break
        hedged |= joined is not None and bool(re.search(r"or\b|/", joined[0]))
        found.append(letter)
        end = item.end()
        joined = _JOIN.match(text, end)
        if joined is None:
            break
    several = len(set(found)) > 1
    return frozenset(found), end, hedged and several


def _concluded(text: str) -> Choice:
    """Returns the choice of a text without a mark or a claim."""
    if len({letter for letter, _ in LISTED.findall(text)}) < 2:
        line = text.split("\n", 1)[0][:500]
        opening = read_choice(line)
        if _opens(line, opening) and not _DISMISSED.match(line):
            return opening
    called = [
        found["letter"]
        for found in _CALLED.finditer(text)
        if not _DOUBTED.search(text[max(0, found.start() - 12) : found.start()])
    ]
    if called:  # all of them: "A is correct. B is correct." is no choice of B
        return Choice(frozenset(called))
    picked = None
    for found in [*_PICKED.finditer(text)][-MAX_PICKS:]:
        choice = read_choice(text[found.end() : found.end() + 200])
        if choice.letters and not _DISMISSED.match(text, found.end()):
            picked = choice
    if picked is not None:
        return picked
    last = text.rstrip().rpartition("\n")[2][-500:]
    if "\n" in text.strip():
        alone = read_choice(last, strict=True)
        listed = len({letter for letter, _ in LISTED.findall(text)})
        if alone.letters and (not alone.text or (listed == 1 and LISTED.match(last))):
            return alone
    sentence = re.split(r"[.!?]\s+(?=[A-Z(])", last)[-1]
    left = {*_BRACKETED.findall(_EXCLUDED.sub("", sentence))}
    hedged = LISTED.match(last) or re.search(r"\bor\s*[(\[][A-Z]", sentence)
    if len(left) == 1 and not hedged:
        return Choice(frozenset(left))
    return Choice(text=_own_text(_SAYING.sub("", text))) if len(text) < 500 else NOTHING


def _opens(text: str, choice: Choice) -> bool:
    """Whether the choice at the beginning of a text is its answer: "B", "B. Paris", "B because"."""
    if choice.number is not None:
        return True
    if not choice.letters:
        return False
    return _OPENING.match(text) is not None
