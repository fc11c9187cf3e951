"""Error messages for checkpoints and logs that could not be written."""

from __future__ import annotations

import re
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

from ..files import way_out


def checkpoint_error(step: int, error: BaseException, folder: Path, previous: Path | None) -> OSError:
    """The error to raise for a checkpoint that could not be written.

    Args:
        error: the cause.
        folder: a folder on the disk in question.
        previous: the checkpoint before this one, which is intact; None if there is none.
    """
    kept = f"the previous one, {previous}, is intact" if previous else "there is no previous one"
    return OSError(
        f"the checkpoint of step {step} could not be written to {folder} ({describe(error)}): "
        f"{way_out(_first(error), folder / 'checkpoint')}. Nothing else is lost, {kept}: the same command resumes"
    )


def log_error(path: Path, error: BaseException) -> OSError:
    """The error to raise for a log that could not be written."""
    return OSError(
        f"{path} could not be written ({describe(error)}): {way_out(error, path)}. The last checkpoint, if there is "
        "one, is intact: the same command resumes"
    )


def describe(error: BaseException) -> str:
    """An error's type and first sentence; for a sharded checkpoint, those of the first process that failed."""
    error = _first(error)
    # torch appends its own source code and advice.
    first_sentence = re.split(r"[.] |\n", str(error), maxsplit=1)[0]
    return f"{type(error).__name__}: {first_sentence}"


def _first(error: BaseException) -> BaseException:
    """The error itself; for a sharded checkpoint's, the error of the first process that failed."""
    return (
        next((found for found, _ in error.failures.values()), error)
        if isinstance(error, CheckpointException)
        else error
    )
