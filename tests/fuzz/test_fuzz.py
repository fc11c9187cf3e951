"""A short part of `make fuzz`: the same inputs in every run. It has to end without a failure; and the harness notices
each kind of failure."""

import shutil
import time
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.campaign import run_all
from tests.fuzz.commands import Commands, inputs, options
from tests.fuzz.harness import DIFFERS, FAILURES, GREEDY, HANG, OK, REFUSED, SILENT, TRACEBACK, Loaders, table
from tests.fuzz.subjects import SUBJECTS, Subject

pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = tuple(name for name in SUBJECTS if name not in ("Janus folder", "training checkpoint", "saved dataset"))


def shown(outcomes):
    return "\n".join(f"{o.verdict}: {o.owner}: {o.subject}, {o.kind}, {o.seed}: {o.what}: {o.said}" for o in outcomes)


def test_damaged_files_end_in_their_own_data_or_in_one_line(tmp_path):
    outcomes = run_all(tmp_path, 80, seed=14, only="loaders", names=QUICK)
    assert len(outcomes) >= 80
    bad = [outcome for outcome in outcomes if outcome.verdict in FAILURES]
    assert not bad, f"{shown(bad)}\n{table(outcomes)}"


def test_wrong_options_end_in_one_line(tmp_path):
    outcomes = run_all(tmp_path, 10, seed=14, only="commands")
    assert len(outcomes) == 10
    bad = [outcome for outcome in outcomes if outcome.verdict in FAILURES]
    assert not bad, f"{shown(bad)}\n{table(outcomes)}"


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "saved dataset"])  # pyarrow needs UTF-8
def test_folders_need_no_name_in_utf8(tmp_path, name):
    (tmp_path / "plain").mkdir()
    SUBJECTS[name].build(tmp_path / "plain")
    try:
        shutil.copytree(tmp_path / "plain", tmp_path / "\udcff")
    except (OSError, UnicodeError):
        pytest.skip("this system has only names that are UTF-8")
    assert SUBJECTS[name].load(tmp_path / "\udcff") == SUBJECTS[name].load(tmp_path / "plain")


def test_every_option_of_every_command_is_among_the_inputs():
    flags = {option.flag for option in options()}
    assert {
        "--guidance",
        "--steps",
        "--strength",
        "--start",
        "--janus",
        "--learning-rate",
        "--cache",
        "--images",
        "--sharding",
        None,
    } <= flags
    assert len(inputs()) > 1000 and {option for option, _ in inputs()} == {
        option for option in options() if option.values
    }
    assert len({option.command for option in options()}) >= 9


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """What the harness says of a loader of one text file, "sound", which is then "other"."""

    def run(load, *, text="other", kind="LFS pointer", **more):
        (tmp_path / "w").mkdir(exist_ok=True)
        subject = Subject(
            name="text", owner="here", build=lambda folder: (folder / "a.txt").write_text("sound"), load=load, **more
        )
        monkeypatch.setitem(SUBJECTS, "text", subject)
        return Loaders(tmp_path / "w", ["text"]).run("text", kind, 0)

    return run


def text(folder: Path) -> str:
    return (folder / "a.txt").read_text()


def is_sound(folder: Path) -> bool:
    return text(folder) == "sound"


def test_another_result_is_a_silent_one_unless_the_content_is_free(judged):
    assert judged(text).verdict == SILENT
    assert judged(text, free=True).verdict == DIFFERS
    assert judged(lambda folder: "always the same").verdict == OK
    assert judged(text, kind="flip").verdict == DIFFERS and judged(text, kind="flip", sealed=True).verdict == SILENT


def test_errors_of_other_code_are_tracebacks_and_so_are_other_kinds(judged):
    def foreign(folder):
        return text(folder) if is_sound(folder) else str(int("x"))

    def own(folder, kind=ValueError):
        code = "def refuse(path, kind):\n    raise kind(f'{path} is bad')"
        names = {}
        exec(compile(code, "/x/dcdd_core/here.py", "exec"), names)
        return text(folder) if is_sound(folder) else names["refuse"](folder / "a.txt", kind)

    assert judged(foreign).verdict == TRACEBACK
    assert judged(own).verdict == REFUSED
    assert judged(lambda folder: own(folder, KeyError)).verdict == TRACEBACK


def test_what_takes_too_long_or_too_much_memory_is_ended(judged, monkeypatch):
    monkeypatch.setattr(harness, "WALL", 1)

    def held(folder):
        return text(folder) if is_sound(folder) else time.sleep(60)

    def large(folder):
        return text(folder) if is_sound(folder) else str(len(bytearray(4 * 2**30)))

    began = time.monotonic()
    assert judged(held).verdict == HANG and time.monotonic() - began < 20
    assert judged(large).verdict == GREEDY


def test_a_number_that_is_none_may_not_be_accepted(tmp_path, monkeypatch):
    runner = Commands(tmp_path)
    number = next(i for i, (option, value) in enumerate(inputs()) if option.flag == "--guidance" and value == "nan")
    monkeypatch.setattr("tests.fuzz.commands.main", lambda words: 0)
    assert runner.run(number).verdict == SILENT
    monkeypatch.setattr("tests.fuzz.commands.main", lambda words: {}["nothing"])
    assert runner.run(number).verdict == TRACEBACK
