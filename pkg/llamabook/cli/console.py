"""Lines in and text out, written by hand: what `run`, `generate` and `chat` share to talk with their caller.

Texts go to stdout, all that is said about them to stderr.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llamabook.errors import InputError, LlamaBookError


def show(text: str) -> None:
    """Put `text` on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def tell(text: str) -> None:
    """Say a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def converse(take: Callable[[str], bool], greeting: str, end: str = "Ctrl-D ends.") -> None:
    """Give each line of stdin to `take`, until that returns False or stdin ends.

    From a pipe, a mistake ends the program; in a terminal it is told, the `greeting` comes first, and Ctrl-C between
    two lines says how to `end`.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        enable_editing()
        tell(greeting)
    while True:
        try:
            line = read_line(interactive)
            if line is None or not take(line):
                return
        except KeyboardInterrupt:
            if not interactive:
                raise
            tell(f"\n{end}")
        except LlamaBookError as error:
            if not interactive:
                raise
            tell(f"llamabook: {error}")


def enable_editing() -> None:
    """Arrow keys and history in the terminal, where Python can do it."""
    try:
        import readline  # noqa: F401
    except ImportError:
        pass


def read_line(interactive: bool) -> str | None:
    """The next line without its break, None at the end. Raises InputError if it is no text."""
    try:
        if not interactive:
            line = getattr(sys.stdin, "buffer", sys.stdin).readline()
            line = line.decode() if isinstance(line, bytes) else line
            return line.removesuffix("\n").removesuffix("\r") if line else None
        if sys.stdout.isatty():
            line = input("> ")
        else:  # the answers go elsewhere: keep the sign out of them
            print("> ", end="", file=sys.stderr, flush=True)
            line = input()
        line.encode()
        return line
    except EOFError:
        tell("")
        return None
    except UnicodeError:
        raise InputError("the line is not valid UTF-8: type or save it as UTF-8") from None


@contextmanager
def stoppable() -> Iterator[None]:
    """Within this block the first Ctrl-C raises KeyboardInterrupt and further ones do nothing."""
    before = signal.getsignal(signal.SIGINT)
    if before in (None, signal.SIG_IGN) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
