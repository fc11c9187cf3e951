"""One training in a folder at a time."""

import multiprocessing
import os
import signal
import time

import pytest

from dcdd_core.training import lock
from dcdd_core.training.lock import run_lock
from tests.training.runs import accelerator

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills processes")


def hold(folder, ready, orphan):
    with run_lock(folder, accelerator()):
        if orphan and os.fork() == 0:  # as a worker that decodes images
            ready.wait()
            time.sleep(20)
            os._exit(0)
        ready.wait()
        time.sleep(60)


@needs_fork
@pytest.mark.parametrize("orphan", [False, True])
def test_the_second_is_refused_and_a_killed_one_leaves_nothing(tmp_path, orphan):
    ready = multiprocessing.get_context("fork").Barrier(2 + orphan)
    first = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, ready, orphan))
    first.start()
    ready.wait(60)
    try:
        words = rf"another training runs in .*\(process {first.pid} on .+\): wait"
        with pytest.raises(ValueError, match=words), run_lock(tmp_path, accelerator()):
            pass
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    with run_lock(tmp_path, accelerator()):
        pass


def test_it_is_given_up_at_the_end_and_after_a_failure(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it failed"), run_lock(tmp_path / "new", accelerator()):
            raise RuntimeError("it failed")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    words = "file/run cannot be written to .*: give another folder"
    with pytest.raises(ValueError, match=words), run_lock(tmp_path / "file" / "run", accelerator()):
        pass


def test_a_disk_that_knows_no_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .*no other training"), run_lock(tmp_path, accelerator()):
        pass
