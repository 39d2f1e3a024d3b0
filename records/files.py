"""One-line errors, and files replaced as a whole. Imports only the standard library, so it loads fast."""

import contextlib
import errno
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ("writing-", ".tmp")  # prefix and suffix of the names of files being written


def one_line(message: str) -> str:
    """Return the message with line ends and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message.strip())


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message or, without a message, the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def mistakes_end(prog: str) -> Iterator[None]:
    """End the process with exit code 2 and one line on standard error if the block raises a ValueError or OSError.

    If the reader of standard output has gone, the process ends silently, as standard shell tools do.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; flushing the rest at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{prog}: error: {one_line(str(error))}\n")
        raise SystemExit(2) from None


@contextlib.contextmanager
def writing(path: str | Path, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turn the OSError of a failed write, which may lack the path, into an error with one line for the user."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or first_line(error)
        raise kind(
            f"cannot write {path}: {cause}; what was there before is kept. Make room or make it writable and start "
            "again, a training run with --auto_resume true"
        ) from error


def check_writable(path: str | Path) -> None:
    """Check before long work that `path` can be written, and create its folder. Raises ValueError if not."""
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
    """Create the folder of `path` and yield a temporary path in it. The file written there replaces `path` as a whole,
    even if the system crashes; on an error, it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begin, end = TEMPORARY
    temporary = path.with_name(f"{begin}{secrets.token_hex(6)}{end}")
    try:
        yield temporary
        # Sync the content before renaming, so that the name never refers to half a file.
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
