"""Pico's training loop: exact resume, a correct log, and a stop at the first number that is not finite."""

import errno
import os
from pathlib import Path

import pytest
import torch

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.log import read_log
from dcdd_pico.build_context import Recipe, stage_context, stage_parser
from dcdd_pico.training_loop import last_held_out, train

SETTINGS = {"seed": 7, "sizes": [1, 2]}


def run(folder, steps, stop_at=None, seen=None, settings=SETTINGS, log_every=1):
    """Trains a line by noisy gradients that depend on the step alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)

    def step(i):
        if i == stop_at:
            raise KeyboardInterrupt
        if seen is not None:
            seen.append(i)
        x = torch.randn(8, 3, generator=keyed_generator(7, i))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    state = {"model": model, "optimizer": optimizer}
    every = {"log_every": log_every, "save_every": 5}
    train(folder, settings=settings, steps=steps, step=step, state=state, **every, report=lambda _: None)
    return model


@pytest.mark.parametrize("log_every", [1, 3])  # 3: the checkpoint of step 10 lies between two lines
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, log_every):
    whole = run(tmp_path / "whole", 20, log_every=log_every)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 20, stop_at=13, log_every=log_every)
    assert read_log(tmp_path / "cut")[-1]["step"] == 13 // log_every * log_every
    seen = []
    resumed = run(tmp_path / "cut", 20, seen=seen, log_every=log_every)
    assert seen == list(range(10, 20))  # from the checkpoint, not from the stop
    assert torch.equal(whole.weight, resumed.weight)
    lines, others = read_log(tmp_path / "whole"), read_log(tmp_path / "cut")
    assert [line["loss"] for line in lines] == [line["loss"] for line in others] and lines[-1]["step"] == 20


def test_a_finished_run_does_nothing(tmp_path):
    first, seen = run(tmp_path, 10), []
    assert torch.equal(first.weight, run(tmp_path, 10, seen=seen).weight) and not seen


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 9, stop_at=6)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    model = torch.nn.Linear(3, 1)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    broken = {"settings": SETTINGS, "steps": 9, "step": lambda i: {"loss": torch.nan}, "state": state}
    with pytest.raises(FloatingPointError, match="loss stopped being finite before step 6"):
        train(tmp_path, **broken, log_every=1, report=lambda _: None)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("write failed")])
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch, error):
    whole = run(tmp_path / "whole", 10)

    def full(saved, path):
        path.write_bytes(b"as far as it went")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"step 5 could not be written to .*there is no previous one"):
            run(tmp_path / "cut", 10)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 10, stop_at=7)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(
            OSError, match=r"step 10 could not .*the previous one, .*checkpoint.pt, is intact: the same command"
        ):
            run(tmp_path / "cut", 10)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint.pt", "log.jsonl"]
    seen = []
    assert torch.equal(run(tmp_path / "cut", 10, seen=seen).weight, whole.weight) and seen == list(range(5, 10))


@pytest.mark.parametrize(
    ("steps", "settings", "words"),
    [
        (20, SETTINGS, "steps 10 -> 20"),
        (10, SETTINGS | {"seed": 8}, "seed 7 -> 8"),
        (10, SETTINGS | {"new": 1}, "new None -> 1"),
    ],
)
def test_a_checkpoint_made_under_other_settings_is_refused(tmp_path, steps, settings, words):
    run(tmp_path, 10)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=words):
        run(tmp_path, steps, settings=settings)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_said(tmp_path):
    run(tmp_path, 10)
    checkpoint = tmp_path / "checkpoint.pt"
    for broken in (b"", b"cut short", checkpoint.read_bytes()[:-200]):
        checkpoint.write_bytes(broken)
        with pytest.raises(ValueError, match="checkpoint.pt is damaged .*move it away"):
            run(tmp_path, 10)


def test_the_last_evaluation_is_a_table_with_its_seconds():
    log = [
        {"step": 1, "seconds": 10.0, "eval/loss": 3.0},
        {"step": 2, "seconds": 20.0, "eval/loss": 2.0, "eval/wrong": 1.23456, "loss": 9.0},
        {"step": 3, "seconds": 30.0, "loss": 8.0},
    ]
    assert last_held_out(log) == (20.0, "| held-out |  |\n|---|---|\n| loss | 2.0000 |\n| wrong | 1.2346 |")
    assert last_held_out([])[0] == 0


def test_a_stage_has_the_recipe_of_its_weights(tmp_path):
    Recipe(seed=5, progressive_steps=7).save(tmp_path)
    chosen = stage_parser(None).parse_args(["--weights", str(tmp_path), "--folder", "work", "--device", "cpu"])
    context = stage_context(chosen, progressive_steps=None)
    assert (context.folder, context.device) == (Path("work"), torch.device("cpu"))
    assert (context.recipe.seed, context.recipe.progressive_steps) == (5, 7)
    assert stage_context(chosen, progressive_steps=3).recipe.progressive_steps == 3
