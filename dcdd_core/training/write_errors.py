"""Error messages for checkpoints and logs that could not be written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException


def checkpoint_error(step: int, error: BaseException, folder: Path, previous: Path | None) -> OSError:
    """The error to raise for a checkpoint that could not be written.

    Args:
        error: the cause.
        folder: on the disk in question.
        previous: the checkpoint before this one, which is intact; None if there is none.
    """
    kept = f"the previous one, {previous}, is intact" if previous else "there is no previous one"
    return OSError(
        f"the checkpoint of step {step} could not be written ({describe(error)}); {_free_space(folder)}. Nothing else "
        f"is lost, {kept}: free some space and run the same command again to resume"
    )


def log_error(path: Path, error: BaseException) -> OSError:
    """The error to raise for a log that could not be written."""
    return OSError(
        f"{path} could not be written ({describe(error)}); {_free_space(path.parent)}. The last checkpoint, if there "
        "is one, is intact: free some space and run the same command again to resume"
    )


def describe(error: BaseException) -> str:
    """An error's type and first sentence; of a sharded checkpoint's, those of the first process that failed."""
    if isinstance(error, CheckpointException):
        error = next((found for found, _ in error.failures.values()), error)
    # torch appends its own source code and advice.
    first_sentence = re.split(r"[.] |\n", str(error), maxsplit=1)[0]
    return f"{type(error).__name__}: {first_sentence}"


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free at {folder}"
