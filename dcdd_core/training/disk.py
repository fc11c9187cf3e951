"""What is said where a disk does not take a checkpoint, or a line of the log."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException


def unwritten(step: int, error: BaseException, folder: Path, before: Path | None) -> OSError:
    """The error to raise for a checkpoint that could not be written.

    Args:
        error: what stopped it.
        folder: on the disk in question.
        before: the checkpoint that stays; None if there is none.
    """
    kept = f"the one before it, {before}, is whole" if before else "there is none before it"
    return OSError(
        f"the checkpoint of step {step} could not be written ({reason(error)}); {_free(folder)}. Nothing else is lost, "
        f"{kept}: make room and run the same again to go on"
    )


def unlogged(path: Path, error: BaseException) -> OSError:
    """The error to raise for a log that could not be written to."""
    return OSError(
        f"{path} could not be written ({reason(error)}); {_free(path.parent)}. The last checkpoint, if there is one, "
        "stays: make room and run the same again to go on"
    )


def reason(error: BaseException) -> str:
    """In a sentence: of parts, why the first process failed that did; without torch's code, or its advice."""
    if isinstance(error, CheckpointException):
        error = next((found for found, _ in error.failures.values()), error)
    words = re.split(r"[.] |\n", str(error), maxsplit=1)[0]
    return f"{type(error).__name__}: {words}"


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free at {folder}"
