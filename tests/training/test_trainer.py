"""Training the decoder: its updates, its log and its checkpoints."""

import json
import math
import os
import random
import shutil
import signal
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from dcdd_core.method.flow import interpolate, shift_time, velocity
from dcdd_core.method.latents import pack
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training import checkpoints, stop
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.config import OptimizationConfig, RunConfig
from dcdd_core.training.decoder_task import DecoderTask
from dcdd_core.training.ema import EMA
from dcdd_core.training.examples import ExampleMaker
from dcdd_core.training.log import read_log
from dcdd_core.training.loss import decoder_loss
from dcdd_core.training.optimizers import adamw_8bit
from dcdd_core.training.schedules import warmup_cosine
from dcdd_core.training.sources import open_images
from dcdd_core.training.stop import TrainingStopped
from dcdd_core.training.trainable import choose_trained
from dcdd_core.training.trainer import Evaluation, Trainer
from tests.tiny import tiny_decoder
from tests.training import runs
from tests.training.runs import encoders, example, files_of_at_most, forked, kill_at, losses, png_folder, run

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="an optional optimiser")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return png_folder(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """An uninterrupted run of 8 steps, which tests do not write to, and the decoder it gave."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder, images)


def by_hand(decoder, images, shard, numbers, *, seed=0, drop=0.0):
    """The losses of a shard's first batches, which have these numbers among those of all processes."""
    tokenizer, codec, geometry = encoders()
    make, config = ExampleMaker(decoder.card, tokenizer, codec, geometry, localised=0.3), OptimizationConfig(steps=1)
    stream = iter(Batches(open_images(images, geometry), size=2, shard=shard))
    found = []
    for number in numbers:
        generator = keyed_generator(seed, number)
        found.append(decoder_loss(decoder, make(next(stream), generator), generator, config, drop=drop))
    return torch.stack(found)


def test_the_loss_is_zero_for_the_true_velocity_and_its_square_for_none(monkeypatch):
    decoder, data, recipe = tiny_decoder(), example(), OptimizationConfig(steps=1)
    seen = {}

    def truth(packed, context, condition, t, size):
        # z_t and z0 give the noise: n = (z_t - (1 - t) z0) / t
        z0, z_t, t = pack(data.latents), packed, t[:, None, None]
        noise = (z_t - (1 - t) * z0) / t
        seen["target"] = noise - z0
        return seen["target"]

    monkeypatch.setattr(decoder, "forward", truth)
    assert float(decoder_loss(decoder, data, keyed_generator(1), recipe)) < 1e-8
    monkeypatch.setattr(decoder, "forward", lambda packed, *rest: torch.zeros_like(packed))
    zero = float(decoder_loss(decoder, data, keyed_generator(1), recipe))
    assert zero == pytest.approx(float(seen["target"].square().mean()), rel=1e-5)


def test_a_shift_moves_the_times_that_are_drawn(monkeypatch):
    decoder, data, seen = tiny_decoder(), example(), []
    monkeypatch.setattr(decoder, "forward", lambda packed, context, condition, t, size: (seen.append(t), packed)[1])
    for shift in (0.0, 1.5):
        decoder_loss(decoder, data, keyed_generator(1), OptimizationConfig(steps=1, shift=shift))
    torch.testing.assert_close(seen[1], shift_time(seen[0], 1.5))


def test_path_and_target_agree():
    z0, n = torch.randn(2, 4), torch.randn(2, 4)
    step = interpolate(z0, n, 0.75) - interpolate(z0, n, 0.25)
    torch.testing.assert_close(step / 0.5, velocity(z0, n))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss(tmp_path, optimizer):
    one = png_folder(tmp_path / "one", count=1)
    trained = run(tmp_path / "run", one, steps=30, optimizer=optimizer, save_every=30)
    found = [line["loss"] for line in read_log(tmp_path / "run")]
    assert sum(found[-9:]) / 9 < 0.6 * sum(found[:3]) / 3
    assert not any(p.requires_grad for p in trained.parameters()) and not trained.training


@needs_fork
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "accumulation": 2},
        {"optimizer": "muon"},
        {"what": "lora"},
        {"what": "adapter", "condition_dropout": 0.5},
        pytest.param({"optimizer": "adamw8bit"}, marks=needs_torchao),
    ],
)
def test_killed_and_resumed_it_is_the_uninterrupted_run(tmp_path, images, changes):
    at = random.randrange(2, 8 * changes.get("accumulation", 1))
    folder = tmp_path / f"killed-at-{at}"
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its update for each shape, for minutes
        whole = run(tmp_path / "whole", images, **changes)
        assert forked(lambda: run(folder, images, on_batch=kill_at(at), **changes)) == [-9]
        resumed = run(folder, images, **changes)
    assert losses(folder) == losses(tmp_path / "whole")
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


@needs_fork
def test_two_processes_are_killed_and_resumed_as_one_is(tmp_path, images):
    at = random.randrange(1, 8)
    together = partial(forked, world=2, clean=True)
    assert together(partial(run, tmp_path / "whole", images)) == [0, 0]
    assert -9 in together(partial(run, tmp_path / "cut", images, on_batch=kill_at(at)))
    assert together(partial(run, tmp_path / "cut", images)) == [0, 0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 8
    firsts = [by_hand(tiny_decoder(), images, DataShard(rank=k, world=2), [k]) for k in (0, 1)]
    assert losses(tmp_path / "whole")[0][1] == pytest.approx(float(torch.cat(firsts).detach().mean()), rel=1e-4)
    average = [checkpoints.load_ema(tmp_path / name / "checkpoints" / "step-00000008") for name in ("cut", "whole")]
    assert all(torch.equal(value, average[1][name]) for name, value in average[0].items())
    # One process goes on where two were, and then they again; the data are held by test_positions.py.
    said = []
    run(tmp_path / "cut", images, steps=10, report=said.append)
    assert said[0] == "cut: resuming from step 8 of 10" and "cut: extended from 8 to 10 updates." in said[1]
    assert "cut: resumed with world size 1 instead of 2. Every image still comes once an epoch" in said[2]
    assert "An update sees 2 images (4 before)" in said[2]
    assert together(partial(run, tmp_path / "cut", images, steps=12)) == [0, 0]
    assert len(losses(tmp_path / "cut")) == 12


@needs_fork
def test_two_processes_leave_conditions_out_each_by_its_own_draws(tmp_path, images):
    """Also where a process leaves none out, or all: every weight has a gradient, for which DDP would wait."""
    changes = {"what": "adapter", "condition_dropout": 0.5}
    assert forked(partial(run, tmp_path, images, **changes), world=2, clean=True) == [0, 0]
    decoder, shards = tiny_decoder(condition_dropout=0.5), [DataShard(rank=k, world=2) for k in (0, 1)]
    firsts = [float(by_hand(decoder, images, shards[k], [k], drop=0.5).detach()) for k in (0, 1)]
    found = losses(tmp_path)
    assert len(found) == 8 and found[0][1] == pytest.approx(sum(firsts) / 2, rel=1e-4)
    assert firsts != [float(by_hand(decoder, images, shards[k], [k]).detach()) for k in (0, 1)]


@needs_fork
@pytest.mark.parametrize("moment", ["written", "renamed"])
def test_killed_within_a_save_one_checkpoint_stays(tmp_path, images, whole, monkeypatch, moment):
    replace, kill = checkpoints.os.replace, kill_at(0)

    def dying(source, target):
        if Path(target).name == "step-00000006":
            if moment == "renamed":
                replace(source, target)
            kill(0)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.os, "replace", dying)
        assert forked(lambda: run(tmp_path / "cut", images)) == [-9]
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert left == ["step-00000003", "step-00000006" + (".tmp" if moment == "written" else "")]
    run(tmp_path / "cut", images)
    assert losses(tmp_path / "cut") == losses(whole[0])
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000008"]


def test_a_step_is_the_mean_of_its_batches_each_with_draws_of_its_number(tmp_path, images):
    run(tmp_path, images, steps=2, accumulation=2, learning_rate=1e-12, seed=3)
    decoder = tiny_decoder()
    found = by_hand(decoder, images, DataShard(), range(4), seed=3)
    logged = [line["loss"] for line in read_log(tmp_path)]
    assert logged == pytest.approx(found.detach().reshape(2, 2).mean(dim=1).tolist(), rel=1e-4)
    decoder.zero_grad()
    found[:2].mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in decoder.parameters() if p.grad is not None])
    assert read_log(tmp_path)[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_each_update_has_the_rate_of_its_number_and_clips_the_gradient(tmp_path, images, monkeypatch):
    rates, clips = [], []
    step, clip = torch.optim.AdamW.step, Accelerator.clip_grad_norm_
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: rates.append(self.param_groups[0]["lr"]) or step(self, *args)
    )
    monkeypatch.setattr(
        Accelerator, "clip_grad_norm_", lambda self, weights, norm: clips.append(norm) or clip(self, weights, norm)
    )
    run(tmp_path, images, steps=6, learning_rate=0.01, warmup=2, clip=0.25, accumulation=1)
    cosine = [0.01 * (0.02 + 0.49 * (1 + math.cos(math.pi * k / 4))) for k in range(4)]
    assert rates == pytest.approx([0.005, 0.01, *cosine]) and clips == [0.25] * 6


def test_the_result_is_the_ema_of_the_weights(tmp_path, images, monkeypatch):
    """After n updates of averaging by n / (9 + n), here never more than the decay of .9."""
    seen, update = [], EMA.update

    def watch(self):
        update(self)
        seen.append(self.weights["adapter.fuse.weight"].detach().double().numpy().copy())

    monkeypatch.setattr(EMA, "update", watch)
    trained = run(tmp_path, images, steps=4)
    expected = seen[0]
    for n, weight in enumerate(seen[1:], 1):
        kept = (1 + n) / (10 + n)
        expected = kept * expected + (1 - kept) * weight
    np.testing.assert_allclose(trained.adapter.fuse.weight.double().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_frozen_weights_stay_and_are_not_saved(tmp_path, images):
    decoder = tiny_decoder()
    decoder.requires_grad_(False)
    decoder.adapter.requires_grad_(True)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    trained = run(tmp_path, images, steps=2, decoder=decoder)
    moved = {k for k, v in trained.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(name.startswith("adapter.") for name in moved)
    with safe_open(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"decoder.{name}" for name in before if name.startswith("adapter.")}


def test_activation_checkpointing_changes_nothing(tmp_path, images):
    calls = []
    plain = run(tmp_path / "plain", images, steps=2)
    decoder = tiny_decoder()
    choose_trained(decoder, "all")
    block = decoder.transformer.transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *args: calls.append(1) or forward(*args)
    again = run(tmp_path / "again", images, steps=2, decoder=decoder, activation_checkpointing=True)
    assert len(calls) == 4  # twice a step
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile wants a C++ compiler on a CPU")
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_training_is_the_plain_one_to_rounding(tmp_path, images, activation_checkpointing):
    plain = run(tmp_path / "plain", images, steps=6).state_dict()
    compiled = run(
        tmp_path / "compiled", images, steps=6, compile=True, activation_checkpointing=activation_checkpointing
    ).state_dict()
    assert list(plain) == list(compiled)  # Names of a checkpoint do not depend on it.
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=2e-4, msg=name)


def test_mixed_precision_is_entered_where_accelerate_does_not(tmp_path, images, monkeypatch):
    def half():
        AcceleratorState._reset_state(reset_partial_state=True)
        found = Accelerator(cpu=True, mixed_precision="bf16")
        found.native_amp = False  # what FSDP2 prepares is left alone
        return found

    monkeypatch.setattr(runs, "accelerator", half)
    decoder = tiny_decoder().bfloat16()
    choose_trained(decoder, "adapter")
    run(tmp_path, images, decoder=decoder, steps=1)
    assert len(losses(tmp_path)) == 1


def test_what_was_not_logged_yet_is_kept(tmp_path, images):
    def stop(k):
        if k == 4:
            raise KeyboardInterrupt

    options = {"steps": 6, "save_every": 3, "log_every": 2}
    run(tmp_path / "whole", images, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", images, on_batch=stop, **options)
    run(tmp_path / "cut", images, **options)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stays(tmp_path, images):
    decoder = tiny_decoder()

    def poison(k):
        if k == 4:
            with torch.no_grad():
                decoder.adapter.fuse.bias.fill_(torch.nan)

    with pytest.raises(
        FloatingPointError, match="loss, gradient_norm stopped being finite before step 5.*--bundle-now"
    ):
        run(tmp_path, images, decoder=decoder, on_batch=poison)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert len(losses(tmp_path)) == 4


def test_a_weight_that_turns_nan_in_a_saving_step_is_not_saved(tmp_path, images, monkeypatch):
    decoder, update = tiny_decoder(), EMA.update
    steps = iter(range(100))

    def poisoned(self):
        if next(steps) == 5:  # the last thing of the sixth step, whose loss was fine
            with torch.no_grad():
                decoder.adapter.fuse.bias.fill_(torch.nan)
        update(self)

    monkeypatch.setattr(EMA, "update", poisoned)
    with pytest.raises(FloatingPointError, match="a weight stopped being finite before step 6"):
        run(tmp_path, images, decoder=decoder)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path, images, whole):
    words = r"step 6 could not be written .*the previous one, .*step-00000003, is intact"
    with files_of_at_most() as limit, pytest.raises(OSError, match=words):
        run(tmp_path / "full", images, on_batch=lambda k: limit(20_000) if k == 4 else None)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000003"]
    run(tmp_path / "full", images)
    assert losses(tmp_path / "full") == losses(whole[0])


def test_a_log_on_a_full_disk_is_reported_and_resumed(tmp_path, images, whole):
    log = tmp_path / "log.jsonl"
    words = r"log\.jsonl could not be written \(OSError: .*GB are free there; make room.*The last checkpoint, if"
    with files_of_at_most() as limit, pytest.raises(OSError, match=words):
        run(tmp_path, images, on_batch=lambda k: limit(log.stat().st_size + 10) if k == 4 else None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    run(tmp_path, images)
    assert losses(tmp_path) == losses(whole[0])


def test_a_sheet_is_complete_or_a_full_disk_is_reported(tmp_path, images):
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    options = {"evaluate": lambda _: Evaluation(sheet=noise), "sample_every": 4}
    words = r"step-00000004\.png could not be written .*GB are free there; make room and do the same again"
    with files_of_at_most() as limit, pytest.raises(OSError, match=words):
        run(tmp_path, images, on_batch=lambda k: limit(5_000) if k == 3 else None, **options)
    assert not list((tmp_path / "samples").iterdir())
    run(tmp_path, images, **options)
    with Image.open(tmp_path / "samples" / "step-00000004.png") as sheet:
        assert sheet.tobytes() == noise.tobytes()


def test_a_checkpoint_of_another_run_is_refused(tmp_path, images):
    run(tmp_path, images, steps=3)
    for changes, words in (
        ({"steps": 2}, "recipe.steps 3 -> 2"),
        ({"steps": 3, "optimizer": "muon"}, "recipe.optimizer 'adamw' -> 'muon'"),
        ({"steps": 3, "batch": 1}, "batch 2 -> 1"),
        ({"steps": 3, "decoder": tiny_decoder(variant="lcdm", calibration=None)}, "card.variant 'lcdm.lc' -> 'lcdm'"),
        ({"steps": 3, "condition_dropout": 0.2}, "card.condition_dropout None -> 0.2"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, images, **changes)
    other = png_folder(tmp_path / "other", count=5)
    with pytest.raises(ValueError, match="saved from other data"):
        run(tmp_path, other, steps=3)
    newest = tmp_path / "checkpoints" / "step-00000003"
    for name in ("average.safetensors", "optimizer.bin"):
        whole = (newest / name).read_bytes()
        words = rf"is damaged \({name}: not what was written\): delete it to resume from the one before it"
        for broken in (b"", b"cut short", whole[:-50], flipped(whole)):
            (newest / name).write_bytes(broken)
            with pytest.raises(ValueError, match=words):
                run(tmp_path, images, steps=3)
        (newest / name).unlink()
        with pytest.raises(ValueError, match=words):
            run(tmp_path, images, steps=3)
        (newest / name).write_bytes(whole)
    told = (newest / "training.json").read_bytes()
    for broken, words in (
        (b'{"format": "dcdd trai', "training.json cannot be read as the description of a training checkpoint"),
        (b'{"format": "another"}', "training.json has the format 'another', expected 'dcdd training 1'"),
        (b"[]", "training.json holds a list, expected the description of a training checkpoint"),
        (told.replace(b'"step": 3', b'"step": 2'), "training.json is damaged: it is not what was written"),
    ):
        (newest / "training.json").write_bytes(broken)
        with pytest.raises(ValueError, match=f"{words}.*delete it to resume"):
            run(tmp_path, images, steps=3)


def flipped(content: bytes) -> bytes:
    """With one bit changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def without_checksums(checkpoint, **changes):
    """As earlier versions wrote it."""
    told = json.loads((checkpoint / "training.json").read_text())
    del told["files"], told["checksum"]
    (checkpoint / "training.json").write_text(json.dumps(told | changes))


def test_a_checkpoint_without_checksums_resumes_and_its_fields_are_checked(tmp_path, images, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    shutil.rmtree(newest.with_name("step-00000008"))
    without_checksums(newest)
    kept = {path: path.read_bytes() for path in newest.glob("*.json")}
    position, means = "position-0.json", '{"loss": 1}'
    for name, text, words in (
        ("training.json", None, "'step' holds '-1', expected a whole number >= 0"),
        (position, "{}", "the field 'epoch' is missing, expected a whole number >= 0"),
        (position, "[]", "holds a list"),
        (position, "\ufeff{}", "the field .epoch. is missing"),
        (
            position,
            '{"epoch": 1, "consumed": 0, "read": 1, "unreadable": 0, "mark": 7}',
            "'mark' holds '7', expected null",
        ),
        (
            position,
            '{"epoch": 1, "consumed": 0, "read": 1, "unreadable": 0, "mark": null, "left_out": {"small": 3}}',
            "'left_out' holds .* expected the names of unreadable and of small images",
        ),
        (
            position,
            '{"epoch": 1, "consumed": 0, "read": 1, "unreadable": 0, "mark": null, '
            '"left_out": {"unreadable": {}, "small": [], "uncaptioned": [3]}}',
            "'left_out' holds .* expected the names of unreadable and of small images",
        ),
        ("means-0.json", means, "the field 'loss' holds '1', expected a sum and a count"),
        ("means-0.json", "[" * 10**5, "cannot be read as running means"),
    ):
        if text is None:
            without = json.loads(kept[newest / name])
            text = json.dumps(without | {"step": -1})
        (newest / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}.*{words}.*delete it to resume"):
            run(tmp_path / "run", images)
        (newest / name).unlink()
        for path, content in kept.items():
            path.write_bytes(content)
    run(tmp_path / "run", images)
    assert losses(tmp_path / "run") == losses(whole[0])


def test_a_damaged_line_of_the_log_is_named(tmp_path, images):
    run(tmp_path, images, steps=1)
    for line in ("{", "[]", '{"step": "a"}'):
        (tmp_path / "log.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"log\.jsonl has a damaged line .*take the line out"):
            run(tmp_path, images, steps=1)


@needs_fork
def test_others_may_read_what_is_written(tmp_path, images):
    before = os.umask(0o022)
    try:
        run(tmp_path, images, steps=1, evaluate=lambda _: Evaluation(score=1.0))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) > 6 and {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path, images):
    for keep, kept in ((1, [4]), (3, [2, 3, 4])):
        run(tmp_path / f"{keep}", images, steps=4, save_every=1, keep=keep)
        found = sorted(path.name for path in (tmp_path / f"{keep}" / "checkpoints").iterdir())
        assert found == [f"step-{step:08}" for step in kept]


def test_an_extended_run_goes_on_as_one_of_its_new_length(tmp_path, images, monkeypatch):
    run(tmp_path, images, steps=4, learning_rate=1.0)
    rates, step, said = [], torch.optim.AdamW.step, []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: rates.append(self.param_groups[0]["lr"]) or step(self, *args)
    )
    run(tmp_path, images, steps=6, learning_rate=1.0, report=said.append)
    assert rates == [warmup_cosine(k, 6, peak=1.0, warmup=2) for k in (4, 5)]
    assert len(losses(tmp_path)) == 6
    assert "extended from 4 to 6 updates. The learning rate goes on as in a run of that length, at 0.51 " in said[1]
    assert "instead of 0.02" in said[1]


def test_the_same_images_an_update_may_be_batched_in_another_way(tmp_path, images, monkeypatch):
    """After an odd number of updates each update still ends with the second of its micro-batches."""
    run(tmp_path, images, steps=3, batch=2)
    events, backward, step = [], Accelerator.backward, AcceleratedOptimizer.step
    monkeypatch.setattr(
        Accelerator, "backward", lambda self, loss: events.append(self.sync_gradients) or backward(self, loss)
    )
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self, *args: events.append("step") or step(self, *args))
    run(tmp_path, images, steps=5, batch=1, accumulation=2)
    assert [event for event in events if event != "step"] == 2 * [False, True], events
    assert len(losses(tmp_path)) == 5
    with pytest.raises(ValueError, match="recipe.accumulation 2 -> 1"):
        run(tmp_path, images, steps=5, batch=1)


@needs_fork
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_a_checkpoint_and_resumed_it_is_the_uninterrupted_run(
    tmp_path, images, whole, number, status
):
    before = signal.getsignal(number)
    with pytest.raises(
        TrainingStopped, match="stopped by .* after step 5 of 8. Its checkpoint is saved .*resume"
    ) as told:
        run(tmp_path, images, on_batch=lambda k: os.kill(os.getpid(), number) if k == 4 else None)
    assert told.value.status == status and signal.getsignal(number) == before
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    run(tmp_path, images)
    assert losses(tmp_path) == losses(whole[0])


@needs_fork
def test_a_second_signal_ends_it_at_once(tmp_path, images, monkeypatch):
    monkeypatch.setattr(stop, "_ONE_SIGNAL", -1)

    def twice(k):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("this is not reached")

    with pytest.raises(KeyboardInterrupt) as told:
        run(tmp_path, images, on_batch=twice)
    assert not isinstance(told.value, TrainingStopped) and not list((tmp_path).glob("checkpoints/*"))


@needs_fork
def test_a_signal_that_a_launcher_passes_on_is_one(tmp_path, images):
    def twice(k):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStopped, match="after step 1 of 8"):
        run(tmp_path, images, on_batch=twice)


@needs_fork
def test_two_processes_stop_after_the_same_step(tmp_path, images):
    assert forked(partial(stopped_by_one, tmp_path, images), world=2, clean=True) == [143, 143]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def stopped_by_one(folder, images):
    """Trains in two processes; the second gets a SIGTERM."""
    rank = int(os.environ["RANK"])
    try:
        run(
            folder,
            images,
            save_every=8,
            on_batch=lambda k: os.kill(os.getpid(), signal.SIGTERM) if (k, rank) == (2, 1) else None,
        )
    except TrainingStopped as stopped:
        sys.exit(stopped.status)


def test_the_weights_of_the_lowest_score_are_kept(tmp_path, images):
    seen, scores = [], iter([3.0, 1.0, 2.0, 1.0])

    def evaluate(decoder):
        seen.append(decoder.adapter.fuse.weight.clone())
        return Evaluation(numbers={}, score=next(scores))

    run(tmp_path, images, steps=6, evaluate=evaluate, sample_every=2)
    best = checkpoints.load_best(tmp_path)
    assert (best.step, best.loss) == (4, 1.0) and torch.equal(best.weights["adapter.fuse.weight"], seen[1])
    run(tmp_path, images, steps=8, evaluate=evaluate, sample_every=2)
    assert checkpoints.load_best(tmp_path).step == 4  # and no later one that is as good
    path = tmp_path / "checkpoints" / "best.safetensors"
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(ValueError, match="best.safetensors is damaged: .* delete it"):
        checkpoints.load_best(tmp_path)
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match="best.safetensors .*delete it"):
        checkpoints.load_best(tmp_path)


def test_how_a_step_is_computed_may_change_on_the_way(tmp_path, images, whole):
    def stop(k):
        if k == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, images, on_batch=stop)
    run(tmp_path, images, activation_checkpointing=True)
    for found, expected in zip(losses(tmp_path), losses(whole[0]), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "plugin", "words"),
    [
        ("FSDP", {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "FSDP1, .* set fsdp_version: 2"),
        ("DEEPSPEED", {}, "DeepSpeed, which is not supported: choose DDP or FSDP2"),
    ],
)
def test_unsupported_kinds_of_sharding_are_refused(tmp_path, kind, plugin, words):
    workers = SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**plugin))
    with pytest.raises(ValueError, match=words):
        Trainer(
            tmp_path / "run",
            DecoderTask(tiny_decoder(), None),
            None,
            OptimizationConfig(steps=1),
            accelerator=workers,
            settings={},
            run=RunConfig(),
        ).train()
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_only_restored(tmp_path, images):
    first, seen = run(tmp_path, images, steps=3).state_dict(), []
    again = run(tmp_path, images, steps=3, on_batch=seen.append).state_dict()
    assert not seen and all(torch.equal(first[name], value) for name, value in again.items())


def test_the_ema_is_what_is_evaluated_and_returned(tmp_path, images, whole):
    seen = []

    def evaluate(decoder):
        seen.append({name: value.clone() for name, value in decoder.state_dict().items()})
        return Evaluation(numbers={"looks": len(seen)})

    looked = run(tmp_path / "looked", images, evaluate=evaluate, sample_every=4)
    assert [line["eval/looks"] for line in read_log(tmp_path / "looked") if "eval/looks" in line] == [1, 2]
    for name, value in whole[1].state_dict().items():  # Looking changes nothing.
        assert torch.equal(looked.state_dict()[name], value) and torch.equal(seen[1][name], value), name
    assert not torch.equal(seen[0]["adapter.fuse.weight"], seen[1]["adapter.fuse.weight"])


@needs_torchao
def test_sharded_weights_need_torchao_s_8_bit_adamw(monkeypatch):
    weights, options = {"w": torch.nn.Parameter(torch.zeros(4))}, {"betas": (0.9, 0.99), "weight_decay": 0.0}
    other = SimpleNamespace(AdamW8bit=lambda *args, **options: "bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=other))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", other)
    assert adamw_8bit(weights.values(), **options) == "bitsandbytes"
    assert type(adamw_8bit(weights.values(), **options, sharded=True)).__module__.startswith("torchao.")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(
        ValueError, match=r"sharded weights \(FSDP\) needs torchao: install it, or take the optimiser 'adamw'"
    ):
        adamw_8bit(weights.values(), **options, sharded=True)
