"""Draws damages of files by hypothesis, and options with their wrong values from the list of all; runs them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from . import mutations
from .commands import Commands, inputs
from .harness import FAILURES, Loaders, Outcome
from .subjects import SUBJECTS

_SHARE = 0.3
"""Of commands among the inputs."""


def run_all(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    only: str | None = None,
    names: tuple[str, ...] = tuple(SUBJECTS),
    report: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """At least so many inputs, the same ones for the same seed.

    Args:
        only: "loaders" or "commands" for one kind.
        names: of the loaders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    commands = 0 if only == "loaders" else count if only == "commands" else round(count * _SHARE)
    outcomes: list[Outcome] = []

    def keep(outcome: Outcome | None) -> None:
        if outcome is None:
            return
        outcomes.append(outcome)
        if outcome.verdict in FAILURES:
            report(f"{len(outcomes)}: {outcome.verdict}: {outcome.subject}, {outcome.kind}, {outcome.seed}")
        elif len(outcomes) % 100 == 0:
            report(f"{len(outcomes)} inputs")

    numbers = st.integers(0, 2**32 - 1)
    if commands < count:
        loaders = Loaders(folder, names)
        drawn = st.tuples(st.sampled_from(names), st.sampled_from(mutations.KINDS), numbers)
        while len(outcomes) < count - commands:
            _each(drawn, count - commands - len(outcomes), seed + len(outcomes), lambda case: keep(loaders.run(*case)))
    if commands:
        runner = Commands(folder)
        chosen = random.Random(seed).sample(range(len(inputs())), min(commands, len(inputs())))
        for number in chosen:
            keep(runner.run(number))
    return outcomes


def _each(drawn: st.SearchStrategy, count: int, seed: int, use: Callable) -> None:
    """Calls `use` with so many draws; nothing is shrunk or remembered, since what fails is listed, not raised."""

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def run(case):
        use(case)

    run()
