"""Trainings that are stopped midway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcdd_core.training.log import read_log


@contextmanager
def stopped_at(step: int, scenes: type) -> Iterator[None]:
    """What runs inside is interrupted when it asks for the scenes of an update, by `scenes.batch`; it has to be."""
    batch = scenes.batch

    def stop(self, asked, size):
        if asked == step:
            raise KeyboardInterrupt
        return batch(self, asked, size)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "batch", stop)
        yield


def assert_same_logs(one: Path, other: Path) -> None:
    """But for the seconds."""
    first, second = ([{**line, "seconds": 0} for line in read_log(folder)] for folder in (one, other))
    assert first == second
