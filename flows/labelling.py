"""The screen of `tribunal label`: a prompt, a response, one key; nothing tells what others said.

Text of models and prompts is shown with every control character spelt out, so nothing in it can
move the cursor, change colours or hide. Keys are read one at a time; there are no colours to miss.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import sys
import termios
import textwrap
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from artifacts.errors import ConfigError

if TYPE_CHECKING:
    from tasks.judges.asking import Item

KEYS = {"r": True, "c": False, "u": None}
NAMES = {True: "refused", False: "complied", None: "unclear"}
HELP = "r refused   c complied   u unclear   b back   q quit"
MORE = "-- space: more; or answer --"
WIDEST, NARROWEST, FLATTEST = 80, 20, 8  # columns, columns, lines
TAKEN = 4  # lines of a screen that are not text
ATTENTION = 0.2  # seconds within which Ctrl-C is noticed
TOGETHER = 0.05  # seconds in which a terminal sends all of one key

Answers = dict[
    tuple[str, str], tuple[bool | None, int]
]  # the last one to each pair, and its number
Keep = Callable[["Item", bool | None, int], None]


def require_terminal() -> None:
    """Refuse to ask where nobody can answer.

    Raises:
        ConfigError: stdin or stdout is no terminal.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "labelling needs a terminal; labels made elsewhere come with --from FILE.csv"
        )


def label_by_hand(items: Sequence[Item], answers: Answers, keep: Keep) -> None:
    """Ask about each item that has no answer yet, until all have one or the person quits.

    Args:
        answers: what was answered before; every new answer goes into it and to `keep`, at once.
    """
    with _key_by_key():
        _go_through(items, answers, keep)


def _go_through(items: Sequence[Item], answers: Answers, keep: Keep) -> None:
    place = _next_open(items, answers, 0)
    while place < len(items):
        item = items[place]
        before = answers.get(item.pair)
        key = _ask(item, place + 1, len(items), before)
        if key == "q":
            return
        if key == "b":
            place = max(place - 1, 0)
            continue
        number = before[1] + 1 if before else 0
        if before is None or before[0] is not KEYS[key]:
            keep(item, KEYS[key], number)
            answers[item.pair] = (KEYS[key], number)
        place = _next_open(items, answers, place + 1)


def _next_open(items: Sequence[Item], answers: Answers, start: int) -> int:
    """The first item from `start` on without an answer, else from the beginning; else the end."""
    places = [*range(start, len(items)), *range(min(start, len(items)))]
    return next((p for p in places if items[p].pair not in answers), len(items))


def _ask(item: Item, number: int, count: int, before: tuple[bool | None, int] | None) -> str:
    """Show one item; the key that answers it."""
    columns, lines = shutil.get_terminal_size((WIDEST, 24))
    width = max(min(columns, WIDEST), NARROWEST)
    head = f" {number} of {count} " + (f"(now: {NAMES[before[0]]}) " if before else "")
    text = [
        head.center(width, "="),
        "PROMPT",
        *wrapped(item.prompt or "(the store has lost its text)", width),
        "",
        "RESPONSE",
        *wrapped(item.response or "(empty)", width),
    ]
    page = max(lines - TAKEN, FLATTEST)
    while text:
        _say(*text[:page])
        text = text[page:]
        key = _key(MORE if text else HELP, {*KEYS, "b", "q", *([" "] if text else [])})
        if key != " ":
            return key
    raise AssertionError("the last page takes no space")


def _key(said: str, known: set[str]) -> str:
    """Wait for one of these keys; any other says what there is."""
    _say("", said)
    while True:
        key = read_key().lower()
        if key in known:
            _say(f"> {NAMES[KEYS[key]]}" if key in KEYS else "")
            return key
        _say(f"{HELP}   (not '{plain(key)}')")


def read_key() -> str:
    """One key, without Enter; Ctrl-D, or a terminal that is gone, quits.

    An arrow or function key comes as escape and more letters, none of which is an answer.
    """
    descriptor = sys.stdin.fileno()
    while not select.select([descriptor], [], [], ATTENTION)[0]:
        pass  # a read would not notice a Ctrl-C that another thread was told of
    read = os.read(descriptor, 1)
    if read == b"\x1b":
        while select.select([descriptor], [], [], TOGETHER)[0] and os.read(descriptor, 1):
            pass
    return "q" if read in (b"", b"\x04") else read.decode(errors="replace")


@contextmanager
def _key_by_key() -> Iterator[None]:
    """Let the terminal hand over keys as they are pressed, and show none of them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def plain(text: str) -> str:
    """A text with every control and format character spelt out; line breaks and tabs stay."""

    def shown(char: str) -> str:
        if char.isprintable() or char in "\n\t":
            return char
        return " " if char == "\N{NO-BREAK SPACE}" else repr(char)[1:-1]

    return "".join(map(shown, text.replace("\r\n", "\n")))


def wrapped(text: str, width: int) -> list[str]:
    """A text as lines of a terminal, indented, controls spelt out."""
    lines = [
        textwrap.wrap(line, width - 2, replace_whitespace=False) or [""]
        for line in plain(text).expandtabs(4).split("\n")
    ]
    return [f"  {part}" for line in lines for part in line]


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
