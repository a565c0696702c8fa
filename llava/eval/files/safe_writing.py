"""Files that survive what happens to a program: replaced as a whole, written by one at a time."""

from __future__ import annotations

import errno
import functools
import os
import warnings
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # not on Windows; two writers are then not told apart
    fcntl = None

#: what a file system says that has no locks, such as some network file systems
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
#: what a file says that cannot wait for its disk
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def errors_with_name(path: str):
    """Names the file in an OSError of writing, such as a full disk: Python does in opening only."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def sync(file) -> None:
    """Waits until what was written survives a crash of the machine, where its disk can tell."""
    with errors_with_name(file.name):
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in NO_SYNC:
                raise


def replace_file(path: str, text: str, temporary: str) -> None:
    """Puts a text in place of a file, all of it or nothing.

    temporary: name it is written under first, on the same file system
    """
    with (
        errors_with_name(path),
        open(temporary, "w", encoding="utf-8", newline="\n") as file,
    ):
        file.write(text)
        sync(file)
    os.replace(temporary, path)


class Lock:
    """The right to write what belongs to `path`, for one process at a time.

    Held through a file in `folder`, which is made for it, and which goes with it when it is empty.
    Raises ValueError when another process has it. Where the file system has no locks, a warning is
    all that happens.
    """

    def __init__(self, path: str, folder: str):
        self.folder, self.name, self.file = folder, os.path.join(folder, "lock"), None
        while self.file is None:
            os.makedirs(folder, exist_ok=True)
            try:
                file = open(self.name, "ab")  # noqa: SIM115 closed by release()
            except FileNotFoundError:
                continue  # a process that finished has just removed the folder
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise ValueError(f"another process is writing to {path}") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    file.close()
                    raise ValueError(f"cannot lock {path}: {error.strerror}") from error
                warn_of_no_locks()
            self.file = file if is_file(file, self.name) else file.close()

    def release(self) -> None:
        """Lets the next process write."""
        if fcntl is None:  # where an open file cannot be removed
            self.file.close()
        os.remove(self.name)
        self.file.close()
        with suppress(OSError):  # not empty
            os.rmdir(self.folder)


def is_file(file, name: str) -> bool:
    """Whether an open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except FileNotFoundError:
        return False


@functools.cache  # said once, however many files there are
def warn_of_no_locks() -> None:
    warnings.warn(
        "the file system of the answers has no locks: two runs that write to the same file would "
        "not notice each other",
        stacklevel=5,
    )
