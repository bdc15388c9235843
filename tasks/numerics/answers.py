"""What an answer says, as against what it should say.

The rule is explicit, because it decides what is called correct. Texts are compared as words: lower
case, letters and digits only. Where the gold answer is one of a closed group (true, false, unknown;
yes, no), the answer says the member of that group that it names first (or last, for models that
reason first and conclude at the end). Otherwise it is correct if it contains the gold answer, and
says which of the other known answers it contains if it does not. An answer that names nothing of
all this is unparsed, and incorrect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

GROUPS: tuple[tuple[str, ...], ...] = (("true", "false", "unknown"), ("yes", "no"))
UNPARSED = ""


def words(text: str) -> str:
    """Lower case, words of letters and digits between single spaces; apostrophes vanish."""
    plain = text.lower().replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    return " ".join(re.findall(r"[^\W_]+", plain))


def predicted(answer: str, gold: str, known: Iterable[str] = (), *, last: bool = False) -> str:
    """What an answer says, in normal form; UNPARSED if nothing that can be told.

    Args:
        answer: the generated text.
        gold: the right answer.
        known: other answers that questions of this kind may have, for open ones.
        last: of a closed group take the member that is named last.

    Raises:
        ValueError: the gold answer has no word.
    """
    said, right = words(answer), words(gold)
    if not right:
        raise ValueError(f"a gold answer needs a word, unlike {gold!r}")
    group = next((group for group in GROUPS if right in group), None)
    if group is not None:
        return _named(said, group, last)
    return right if _contains(said, right) else _named(said, sorted(map(words, known)), last)


def is_correct(prediction: str, gold: str) -> bool:
    """Whether a prediction of `predicted` is the gold answer; an unparsed one never is."""
    return prediction != UNPARSED and prediction == words(gold)


def _named(said: str, candidates: Sequence[str], last: bool) -> str:
    """The candidate that is named first (or last); of two at one place the longer."""
    found = [
        (place, len(candidate), candidate)
        for candidate in candidates
        if candidate and (place := _place(said, candidate, last)) >= 0
    ]
    if not found:
        return UNPARSED
    if last:
        return max(found)[2]
    return min(found, key=lambda one: (one[0], -one[1]))[2]


def _contains(said: str, phrase: str) -> bool:
    return _place(said, phrase, False) >= 0


def _place(said: str, phrase: str, last: bool) -> int:
    """Where a phrase stands among whole words; -1 if nowhere."""
    padded, wanted = f" {said} ", f" {phrase} "
    return padded.rfind(wanted) if last else padded.find(wanted)
