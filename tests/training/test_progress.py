"""What a training says while it runs."""

import io
import re

from dcdd_core.training.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, **options):
    bar = ProgressBar("run", 100, stream=stream, **options)
    bar.start(40)
    for step in range(41, 101):
        line = {"step": step, "seconds": 1.0, "loss": step / 1000} if step % 10 == 0 else {}
        evaluated = step == 50
        bar.advance(step, line | ({"eval/loss": 0.5} if evaluated else {}), evaluated=evaluated)
    bar.close()
    return stream.getvalue()


def test_a_log_gets_a_line_every_so_often_and_for_every_evaluation():
    said = shown(io.StringIO()).splitlines()
    assert len(said) == 2
    line = r"run 50/100, loss 0.05, eval/loss 0.5, \S+ updates/s, 00:\d\d left, \d+\.\d GB of memory"
    assert re.fullmatch(line, said[0]) and said[1].startswith("run 100/100, loss 0.1,")
    assert len(shown(io.StringIO(), every=0).splitlines()) == 60


def test_a_terminal_gets_a_bar_with_rate_time_and_memory():
    said = shown(Terminal())
    last = said.rstrip().split("\r")[-1]
    assert "100/100" in last and "loss 0.1" in last and "update/s" in last and "GB of memory" in last
    assert said.count("run 50/100, loss 0.05, eval/loss 0.5") == 1
