"""A lock on a run's folder: one training at a time. The system releases it when the process ends, in whatever way."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..types import DCDDWarning

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "training.lock"
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
#: The byte that is locked on Windows. It lies beyond the file's content, since others cannot read a locked byte there.
_BYTE = 1 << 30


@contextmanager
def run_lock(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Holds the lock of a run's folder, which is created if needed; all processes must call this together.

    Raises:
        ValueError: in all processes, if another training holds the lock, or the folder cannot be written to.
    """
    from accelerate.utils import broadcast_object_list

    file, refusal = None, [None]
    if accelerator.is_main_process:
        try:
            file = _locked(folder)
        except ValueError as error:
            refusal = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise ValueError(refusal[0])
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _locked(folder: Path) -> BinaryIO:
    """Takes the lock and returns its open file; closing the file releases the lock.

    Raises:
        ValueError: if another process holds the lock, or the folder cannot be written to.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to ({error.strerror}): give another folder, or change its permissions"
        ) from error
    try:
        _lock(file)
    except OSError as error:
        if error.errno in _TAKEN:
            owner = _owner(file)
            file.close()
            raise ValueError(
                f"another training runs in {folder}{owner}: wait for its end or stop it, or give another --out"
            ) from error
        # Some network file systems do not support locks.
        warnings.warn(
            f"{path} cannot be locked ({error.strerror}): take care that no other training runs in this folder",
            DCDDWarning,
            stacklevel=2,
        )
    if hasattr(os, "register_at_fork"):
        # A worker that outlives a killed training would keep holding the lock.
        os.register_at_fork(after_in_child=file.close)
    file.truncate(0)
    file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
    file.flush()
    return file


def _owner(file: BinaryIO) -> str:
    """Which process holds the lock, as text for a message; empty if unknown."""
    try:
        file.seek(0)
        said = json.loads(file.read(1000))
        return f" (process {said['process']} on {said['host']})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _lock(file: BinaryIO) -> None:
    """Locks the file without waiting; raises OSError if that fails."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
