"""Starts the command line a hundred times and imports torch once.

A process that has imported everything a study imports waits on a socket; each order forks it, and
the fork runs `tribunal` with its own arguments, environment and files. So a victim is a process
like any other, killed like any other, but its life is spent in the work and not in imports.

    launcher.py SOCKET    the first order, a whole study, comes by stdin; its modules are imported;
                          then one connection per process: an order as JSON, its process id, a
                          byte back when the tests hold it, and its exit code
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

WRITING = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")
Order = dict[str, Any]


def serve(listener: socket.socket) -> Order:
    """Fork for every order, until the tests close our stdin. Returns in the forks."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # attendants need no burial
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            order = attend(connection)
            connection.close()
            return order
        connection.close()


def attend(connection: socket.socket) -> Order:
    """Read an order, fork for it, tell its process id and then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    order: Order = json.loads(connection.makefile().readline())
    born, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.read(born, 1)  # until the tests hold us by our process id
        os.close(born)
        return order
    connection.sendall(f"{pid}\n".encode())
    connection.recv(1)
    os.write(told, b".")
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):  # the tests need not wait for it
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(order: Order) -> None:
    """Take on the order's environment, files and fate."""
    os.environ.clear()
    os.environ.update(order["environment"])
    for number, place, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        handle = os.open(place, flags)
        os.dup2(handle, number)
        os.close(handle)
    sys.argv = ["tribunal", *order["arguments"]]
    store = order["environment"]["TRIBUNAL_STORE"]
    if "last_write" in order or "count_to" in order:
        watch_writes(store, order.get("last_write"), order.get("count_to"))
    if "modules_to" in order:
        atexit.register(lambda: Path(order["modules_to"]).write_text("\n".join(sys.modules)))


def watch_writes(root: str, last: int | None, count_to: str | None) -> None:
    """Count what is written in the store; die just before write number `last`."""
    done = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        opened = event == "open" and isinstance(arguments[2], int)
        writes = (opened and arguments[2] & (os.O_WRONLY | os.O_RDWR)) or event in WRITING
        if writes and str(arguments[0]).startswith(root):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if count_to:
        atexit.register(lambda: Path(count_to).write_text(str(done)))


def prepare(order: Order) -> bool:
    """Import what a study imports: all that a first run, in a fork, had imported at its end.

    Returns whether this process is that fork.
    """
    for name in order["imports"]:
        importlib.import_module(name)
    pid = os.fork()
    if pid == 0:
        become(order)
        return True
    os.waitpid(pid, 0)
    for name in Path(order["modules_to"]).read_text().split("\n"):
        with suppress(ImportError, AttributeError, RuntimeError):
            importlib.import_module(name)
    return False


def main() -> None:
    from flows.cli import main as command_line

    place = Path(sys.argv[1])
    if not prepare(json.loads(sys.stdin.readline())):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place))
        listener.listen(64)
        become(serve(listener))
    command_line()


if __name__ == "__main__":
    main()
