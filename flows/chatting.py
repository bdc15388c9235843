"""A conversation on the terminal or through a pipe: a line is a turn."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from artifacts.errors import ModelError, one_line
from flows import display

if TYPE_CHECKING:
    from tasks.conversation import Conversation

QUIT, RESET = ("/quit", "/exit"), "/reset"


def converse(conversation: Conversation, title: str) -> None:
    """Answer lines of stdin until they end, or until one says so. Replies go to stdout."""
    on_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    _tell(title)
    for line in _typed() if on_terminal else sys.stdin:
        said = line.strip()
        if said in QUIT:
            return
        if said == RESET:
            conversation.reset()
            _tell("forgotten; a new conversation")
        elif said.startswith("/"):
            _tell(f"no command '{said.split()[0]}'; there are {RESET} and {QUIT[0]}")
        elif said:
            _answer(conversation, said)


def _typed() -> Iterator[str]:
    """Lines that a person types, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then edits the line and remembers earlier ones
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    sys.stdout.write("\n")


def _answer(conversation: Conversation, said: str) -> None:
    """Stream one reply; Ctrl-C breaks off the reply, not the conversation."""
    pieces = conversation.say(said)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except ModelError as error:
        _tell(str(error))
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # a generator
        if not sys.stdin.isatty():
            raise
    sys.stdout.write("\n")
    sys.stdout.flush()


def _tell(line: str) -> None:
    display.console(stderr=True).print(one_line(line), style="dim", markup=False, soft_wrap=True)
