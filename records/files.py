"""Text and files: errors in one line, files replaced as a whole. Imports no library, so that it costs no time."""

import contextlib
import errno
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ("writing-", ".tmp")  # how the names of files that are being written begin and end


def one_line(message: str) -> str:
    """The message with line ends and whatever else cannot be printed spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message.strip())


def first_line(error: BaseException) -> str:
    """The first line of the error's message; of an error without one, its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def mistakes_end(prog: str) -> Iterator[None]:
    """End the process with exit code 2 and one line on standard error if what is done in it raises a user's mistake.

    Where the reader of standard output has gone, it ends without a word, as a shell's own commands do.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is left must not fail at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{prog}: error: {one_line(str(error))}\n")
        raise SystemExit(2) from None


def cannot_write(path: str | Path, error: OSError) -> str:
    """One line for the user: the file, the cause, what to do."""
    cause = error.strerror or first_line(error)
    return (
        f"cannot write {path}: {cause}; what was there before is kept. Make room or make it writable and start again, "
        "a training run with --auto_resume true"
    )


@contextlib.contextmanager
def writing(path: str | Path, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn the system's error of a failed write, which may lack the path, into a line for the user."""
    try:
        yield
    except OSError as error:
        raise kind(cannot_write(path, error)) from error


def check_writable(path: str | Path) -> None:
    """Ask before long work whether a file can be written to `path`, whose folder is made. ValueError if not."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, which is made; what was written there replaces `path` as a
    whole, also where the machine fails, or on an error is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begin, end = TEMPORARY
    temporary = path.with_name(f"{begin}{secrets.token_hex(6)}{end}")
    try:
        yield temporary
        # First the content, then the name, so that the name never stands for half of a file.
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
