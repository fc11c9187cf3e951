"""How a training ends: what holds the process group is gone before the group is."""

from __future__ import annotations

import weakref

import pytest

from dcdd_core.training.run import ends_training
from dcdd_core.training.stop import TrainingStopped


class Wrapper:
    """Like DistributedDataParallel's: held by the training's frame and by the accelerator."""


class Accelerator:
    distributed_type = "MULTI_CPU"

    def __init__(self):
        self.models, self.alive = [], []

    def free_memory(self):
        self.models.clear()

    def end_training(self):
        self.alive.append(self.wrapper() is not None)


def train(accelerator: Accelerator, error: BaseException | None) -> None:
    wrapper = Wrapper()
    accelerator.models.append(wrapper)
    accelerator.wrapper = weakref.ref(wrapper)
    if error is not None:
        raise error


@pytest.mark.parametrize("error", [None, TrainingStopped("stopped", 15)])
def test_the_wrapper_is_gone_before_the_process_group(error):
    accelerator = Accelerator()
    try:
        with ends_training(accelerator):
            train(accelerator, error)
    except TrainingStopped as stopped:
        assert stopped is error
    assert accelerator.alive == [False]


def test_other_errors_leave_the_end_to_the_launcher():
    accelerator = Accelerator()
    with pytest.raises(ValueError), ends_training(accelerator):
        train(accelerator, ValueError("bad"))
    assert accelerator.alive == []
