"""Finds the final answer in a completion; one notion of it for scorers and rewards.

A *mark* is `\\boxed{}`, `<answer>...</answer>` or GSM8K's `#### ` on the last line. A *claim* is
what follows "the answer is" or "Answer:". Text before `</think>` is no part of the answer. All
functions take time in proportion to the text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

MAX_CLAIM = 2000  # characters of a claim that are read
MAX_CORRECTIONS = 20  # that are read, the last ones

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\b[ \t]*")
_BARE = re.compile(r"[^\s{}$]+")
_TAG = re.compile(r"<answer>|</answer>", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s$.,;/&]*(?:(?:and|or)\b)?[\s$]*", re.IGNORECASE)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*?)\s*\Z", re.MULTILINE)
_CLAIM = re.compile(
    r"\b(?P<noun>answer|ans|choice|option|solution|result|conclusion)\b"
    r"(?:[ \t]+(?:to|of|for|here|in|i choose|i pick)\b[^.:=\n]{0,80}?)?[ \t]*"
    r"(?:\b(?:is|was|are|equals|becomes|(?:would|should|must|has to|have to|will)[ \t]+be)\b"
    r"(?:[ \t]+(?:as follows|equal to))?[ \t]*:?|[:=\u2192\u21d2]|->|=>)\s*",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"\b(?:wrong|incorrect|other|false|bad|worst)[ \t]+$"
    r"|\b(?:say|says|said|think|thinks|claim|claims|argue|believe)s?[ \t]+(?:that[ \t]+)?"
    r"(?:the[ \t]+)?(?:correct[ \t]+|right[ \t]+)?$",
    re.IGNORECASE,
)
_MYSELF = re.compile(
    r"\b(?:i|we)[ \t]+(?:would[ \t]+)?\w+[ \t]+(?:that[ \t]+)?(?:the[ \t]+)?"
    r"(?:correct[ \t]+|right[ \t]+)?$",
    re.IGNORECASE,
)
_REASON = re.compile(r"\b(?:because|since|as|given that|although|whereas|if)\b", re.IGNORECASE)
_REPEATED = re.compile(
    r"\s*(?P<it>(?!(?:the|my|so|and|final|correct)\b)[^\s.;,]{1,20})[.;,!]?\s*"
    r"(?:(?:and|or)\s+)?(?:the\s+|my\s+)?"
    r"(?:correct\s+|right\s+|final\s+)?",
    re.IGNORECASE,
)
_PAUSE = r"[ \t]*[,.:;!\u2014\u2026-]+[ \t\n]*"
_CORRECTION = re.compile(
    r"(?:\b(?:wait|no(?=[ \t]*[,.:;!\u2014\u2026-])|sorry|correction|scratch that"
    rf"|on second thoughts?)\b(?:{_PAUSE}|[ \t]+)"
    # "4, because there are actually 2 dogs": these correct where a sentence begins, after a pause,
    # or with an answer and no more.
    rf"|(?:\A|[.!?;\u2014\u2026\n-])[ \t\"'(*]*actually\b(?:{_PAUSE}|[ \t]+)"
    rf"|\b(?:i mean|or rather)\b{_PAUSE}"
    r"|(?:(?<!are )(?<!is )(?<!was )(?<!were )\bactually|\bi mean|\bor rather)\b[ \t]*,?[ \t]*"
    r"(?=\S{1,24}(?:[ \t]\S{1,12})?[ \t]*(?:[.!;)\n]|\Z))"
    r")(?=(?P<then>[^\n]{1,200}))",
    re.IGNORECASE,
)


_BULLET = re.compile(r"\A[-*\u2022][ \t]+")


class Final(NamedTuple):
    """The final answer of a completion.

    Attributes:
        text: the content of the mark or what follows the claim, to the end of its line; without
            either, the text itself.
        kind: "marked", "claimed" or "none".
        corrections: what follows "no,", "wait," and the like after a claim, or anywhere in a text
            without one; the last one first.
    """

    text: str
    kind: str
    corrections: tuple[str, ...] = ()


def final_answer(text: str) -> Final:
    """Returns the final answer: the last mark, else the last claim, else the whole text.

    Marks that only "or", "and" or a comma separates are one answer of several parts, and so are
    claims one after the other ("The answer is A. The answer is B."). A claim inside a mark is read.
    No claim is one that repeats others ("some say the answer is A"), that denies ("is not A"), or
    that stands in the reason of another ("B, because option: A is too small").
    """
    text = after_thinking(text)
    inner = marked(text)
    for _ in range(8):
        if inner is None or (deeper := marked(inner)) is None:
            break
        inner = deeper
    found = claim(text if inner is None else inner)
    if found is not None:
        return found
    if inner is not None:
        return Final(inner, "marked")
    return Final(text, "none", _corrections(text, 0))


def after_thinking(text: str) -> str:
    """Returns the text after the last `</think>`; nothing if the thinking was cut off."""
    head, end, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return ""
    return rest if end else head + rest


def marked(text: str) -> str | None:
    """Returns the content of the last mark; None without one. A box that never closes was cut off:
    its content is empty."""
    boxes, tags = _boxes(text), _tags(text)
    groups = [spans for spans in (boxes, tags) if spans]
    if not groups:
        lines = _HASHES.search(text[-MAX_CLAIM:])
        return lines[1] if lines else None
    spans = max(groups, key=lambda spans: spans[-1][1])
    contents, joined = [text[spans[-1][2] : spans[-1][3]]], " , "
    for one, after in zip(spans[-2::-1], spans[:0:-1], strict=True):
        if not _BETWEEN.fullmatch(text, one[1], after[0]):
            break
        contents.append(text[one[2] : one[3]])
        if re.search(r"\bor\b|/", text[one[1] : after[0]], re.IGNORECASE):
            joined = " or "
    different = list(dict.fromkeys(content.strip() for content in reversed(contents)))
    return joined.join(different)


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Returns (start, end, start of the content, end of the content) of every outermost box."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.end()
    # A backslash and the letter after it are skipped together; what is left are braces alone.
    found: list[tuple[int, int, int, int]] = []
    for box in _BOX.finditer(text):
        start, at = box.start(), box.end()
        if found and start < found[-1][1]:
            continue
        if text[at : at + 1] == "{":
            end = closing.get(at, len(text))
            stop = end - 1 if at in closing else at + 1
            found.append((start, end, at + 1, stop))
        elif box[0][-1:] in " \t" and (word := _BARE.match(text, at)):
            found.append((start, word.end(), at, word.end()))
    return found


def _tags(text: str) -> list[tuple[int, int, int, int]]:
    """Returns the same of every `<answer>`. One that never closes reaches to the end, one that
    never opens (the prompt did it) begins with the text."""
    found: list[tuple[int, int, int, int]] = []
    opened: tuple[int, int] | None = (0, 0)
    for tag in _TAG.finditer(text):
        if tag[0][1] != "/":
            opened = tag.span()
        elif opened is not None:
            found.append((opened[0], tag.end(), opened[1], tag.start()))
            opened = None
    if opened is not None and opened != (0, 0) and text[opened[1] :].strip():
        found.append((opened[0], len(text), opened[1], len(text)))
    return found


def claim(text: str) -> Final | None:
    """Returns the last claim of a text; None without one."""
    text = without_emphasis(text)
    before_last: re.Match[str] | None = None
    last: re.Match[str] | None = None
    for found in _CLAIM.finditer(text):
        before = text[max(0, found.start() - 120) : found.start()]
        others = _OTHERS.search(before) and not _MYSELF.search(before)
        denied = re.match(r"(?:not|never)\b(?![^.\n]{0,40}\bbut\b)", text[found.end() :][:60])
        stop = 0 if last is None else min(found.start(), last.end() + MAX_CLAIM)
        reason = last is not None and _gives_a_reason(text[last.end() : stop])
        if not (others or denied or reason):
            before_last, last = last, found
    if last is None:
        return None
    content = text[last.end() : last.end() + MAX_CLAIM].split("\n", 1)[0].strip()
    if "\n" in last[0]:  # a list of one
        content = _BULLET.sub("", content)
    if turned := re.match(r"(?:not|never)\b[^.\n]{0,40}?\bbut\b\s*", content):
        content = content[turned.end() :]
    if before_last is not None and last.start() - before_last.end() < 60:
        repeated = _REPEATED.fullmatch(text, before_last.end(), last.start())
        own = normal_text(re.split(r"[\s.;,]", content, maxsplit=1)[0])
        if repeated and normal_text(repeated["it"]) != own:
            content = f"{repeated['it']} or {content}"
    return Final(content, "claimed", _corrections(text, last.end()))


def _corrections(text: str, start: int) -> tuple[str, ...]:
    then = [found["then"].strip() for found in _CORRECTION.finditer(text, start)]
    return tuple(then[: -MAX_CORRECTIONS - 1 : -1])


def _gives_a_reason(text: str) -> bool:
    """Whether a text goes on, in the sentence that it begins in, with a subordinate reason."""
    if len(text) == MAX_CLAIM or re.search(r"[.!?](?=\s)|\n", text):
        return False
    return bool(_REASON.search(text))


def without_emphasis(text: str) -> str:
    """Returns the text without Markdown's **, __ and code marks, which cut through words."""
    return re.sub(r"(?<!\d)\*\*|\*\*(?!\d)|__|`+|(?<![\w*])\*(?=\w)|(?<=\w)\*(?![\w*])", "", text)


_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-"
)
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")
_VULGAR = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")
_DASHES = str.maketrans("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-------")
_WORDED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox|boldsymbol)"
    r"\s*\{([^{}]*)\}"
)
_SPACES = re.compile(r"\\[,;:! ]|\\quad\b|\\qquad\b|~|\\(?:left|right|displaystyle|limits)\b")


def plain(text: str) -> str:
    """Returns a text in plain characters: digits and signs of other scripts as ASCII, powers with
    ^, Markdown's emphasis and LaTeX's dollars, spacing and \\text{} taken away."""
    text = _VULGAR.sub(" ", text)
    text = _RAISED.sub(lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = unicodedata.normalize("NFKC", text).translate(_DASHES).replace("\u2044", "/")
    if not text.isascii():
        digits = {ord(c): str(unicodedata.decimal(c)) for c in set(text) if c.isdecimal()}
        text = text.translate(digits)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ",", without_emphasis(text))
    text = re.sub(r"\\[()\[\]]|\$\$", " ", text)
    text = re.sub(r"(?<!\\)\$([^$\n]*)(?<!\\)\$", r"\1", text)
    for _ in range(3):  # as deep as people nest them
        text = _WORDED.sub(r"\1", text)
    text = re.sub(r"(?<=[A-Za-z])\s?\^\s?\{\s?([23])\s?\}", r"^\1", text)  # of a unit
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", _SPACES.sub(" ", text))
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree\b|\\circ\b", "\u00b0", text)
    return re.sub(r"\\([%$#&_])", r"\1", text).strip()


def normal_text(text: str) -> str:
    """Returns a short answer in the form in which answers are compared as text: plain, in one case,
    without outer punctuation, a leading article and surplus space."""
    words = " ".join(plain(text).casefold().split()).strip(
        " \t.,;:!?\"'`()[]{}*<>\u201c\u201d\u2019"
    )
    return re.sub(r"^(?:the|an?) (?=\S)", "", words)
