"""One training in a folder at a time."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcdd_core.training import lock
from dcdd_core.training.lock import run_lock
from tests.training.runs import accelerator

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def windows(monkeypatch):
    """Windows' locks in the place of fcntl's: a byte of an open file, which nobody else can then lock."""
    held = set()

    def locking(descriptor, mode, count):
        assert (mode, count) == (2, 1)
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if place in held:
            raise PermissionError(13, "Permission denied")
        held.add(place)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.delattr(os, "register_at_fork", raising=False)
    return held


def test_windows_locks_a_byte_beyond_what_others_read(tmp_path, windows):
    with run_lock(tmp_path, accelerator()):
        ((_, place),) = windows
        told = (tmp_path / "training.lock").read_bytes()
        assert json.loads(told)["process"] == os.getpid() and place > len(told)
        words = rf"another training runs in .*\(process {os.getpid()} on .+\): wait"
        with pytest.raises(ValueError, match=words), run_lock(tmp_path, accelerator()):
            pass


IMPORTS = """
import os, signal, sys, types
import accelerate, datasets, diffusers, matplotlib.figure, torch.utils.data, torch.utils.tensorboard, transformers
from transformers import JanusForConditionalGeneration
for name in ("fcntl", "resource", "pwd", "grp", "termios", "posix"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "getuid", "geteuid", "umask", "mkfifo", "killpg", "sysconf"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "alarm", "setitimer"):
    if hasattr(signal, name):
        delattr(signal, name)
from importlib import import_module
from pathlib import Path
for package in ("dcdd_core", "dcdd_pico"):
    for file in sorted(Path(package).rglob("*.py")):
        name = ".".join(file.with_suffix("").parts)
        if not name.endswith("__main__"):
            import_module(name.removesuffix(".__init__"))
"""


def test_every_module_can_be_imported_where_there_is_nothing_of_unix():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
