"""Students of few steps: what they learn from, their training, their bundles, and what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from dcdd_core.cli.app import main as dcdd
from dcdd_core.cli.train import main
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.bundle import load_decoder, read_card, save_bundle
from dcdd_core.models.card import Distilled, ServedGuidance
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.decode import Canvas, paint
from dcdd_core.settings import require_same_settings
from dcdd_core.training.checkpoints import TEACHER_GUIDANCE, TEACHER_SHIFT, _continued
from dcdd_core.training.config import DistillationConfig, OptimizationConfig
from dcdd_core.training.distillation_task import DistillationTask
from dcdd_core.training.log import read_log
from dcdd_core.training.trainable import choose_trained
from dcdd_pico import embedded
from tests.tiny import random_pico, tiny_decoder
from tests.training.runs import encoders, example, forked, kill_at, losses, png_folder, run

pytestmark = pytest.mark.filterwarnings("ignore:.*")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def student(objective="trajectory", teacher_steps=4, **changes):
    told = {"steps": 2, "distilled": Distilled(objective=objective, teacher_steps=teacher_steps)}
    decoder = tiny_decoder(**told | changes)
    choose_trained(decoder, "all")
    return decoder


def teacher(**changes):
    return tiny_decoder(**{"steps": 4} | changes).requires_grad_(False)


def task_of(decoder, examples=lambda data, generator: data, by=None):
    return DistillationTask(decoder, examples, teacher() if by is None else by)


def masked_example(batch):
    data, mask = example(batch), torch.ones(batch, 1, 16, 16)
    mask[-1, :, :, 8:] = 0
    return replace(data, mask=mask, masked_latents=torch.randn(batch, 16, 8, 8, generator=keyed_generator(8)))


def painted(decoder, data, seeds, **options):
    """Normalised latents, under the example's mask."""
    codec = encoders()[1]
    canvas = Canvas(given=codec.denormalize(data.masked_latents), area=data.mask)
    return codec.normalize(paint(decoder, codec, data.condition, canvas, seeds=seeds, **options))


GUIDED = {"condition_dropout": 0.2, "condition_guidance": 2.5}


@pytest.mark.parametrize("guided", [{}, GUIDED], ids=["plain", "guided"])
def test_what_is_taught_is_what_the_teacher_paints(guided):
    """From the same noise and under the same mask; and the distance is that of what both paint by default."""
    by, learner, data, seeds = teacher(**guided), student(), masked_example(2), [4, 9]
    task = task_of(learner, by=by)
    mine, theirs = painted(learner, data, seeds), painted(by, data, seeds)
    noise = torch.cat([torch.randn(1, 16, 8, 8, generator=keyed_generator(seed)) for seed in seeds])
    found = task.distances(learner, data, noise)
    torch.testing.assert_close(found, (mine - theirs).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)
    assert found.shape == (2,) and float(found.min()) > 1e-3
    single = masked_example(1)
    shown = task.example(single, keyed_generator(4), None).shown
    aim = by.backbone.unpack(shown.states[-1], (8, 8))
    torch.testing.assert_close(aim, painted(by, single, [4]), rtol=1e-3, atol=1e-4)
    if guided:
        assert (aim - painted(by, single, [4], condition_guidance=1.0)).abs().max() > 1e-2


def test_the_schedules_are_those_of_the_cards():
    for shift, own in ((None, 0.7), (2.0, 2.0)):
        learner = student(shift=own if shift is None else shift, teacher_steps=5)
        found = task_of(learner, by=teacher(shift=own)).schedule((8, 8))
        assert len(found.student) == 3 and found.student[1] == pytest.approx(
            1 / (1 + torch.tensor(-(shift or own)).exp().item()), rel=1e-5
        )
        assert len(found.teacher) - 1 == 6  # five, and one to come by
    said = list(task_of(student(steps=4, teacher_steps=5), by=teacher(**GUIDED)).summary((8, 8)))
    assert said[0] == (
        "a student of 4 steps from a teacher of 5, objective trajectory, which takes the teacher's condition guidance "
        "of 2.5 over"
    )
    assert said[1].startswith("the student's times: 1, 0.") and said[2].startswith("the teacher takes 8 steps in")


@pytest.mark.parametrize("objective", ["trajectory", "consistency"])
def test_training_brings_the_student_nearer_to_its_teacher(tmp_path, objective):
    one, learner = png_folder(tmp_path / "one", count=1), student(objective)
    data, noise = example(8), torch.randn(8, 16, 8, 8, generator=keyed_generator(1))
    before = task_of(learner).distances(learner, data, noise).mean()
    made = run(
        tmp_path / "run",
        one,
        steps=40,
        save_every=40,
        decoder=learner,
        task=partial(DistillationTask, teacher=teacher()),
    )
    assert task_of(made).distances(made, data, noise).mean() < 0.7 * before


@pytest.mark.parametrize("objective", ["trajectory", "consistency"])
def test_the_losses_reach_every_trained_weight_of_the_student_alone(objective):
    """Also under autocast, which keeps copies of weights from one pass to the next."""
    for half in (False, True):
        learner, by = student(objective), teacher()
        task = task_of(learner, by=by)
        lesson = task.example(example(2), keyed_generator(2), None)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = task.losses(learner, lesson, keyed_generator(2), OptimizationConfig(steps=1))["loss"]
        loss.backward()
        lost = [name for name, weight in learner.named_parameters() if weight.grad is None]
        assert all(by.backbone.unused(name.removeprefix("transformer.")) for name in lost), lost
        assert not any(weight.requires_grad for weight in by.parameters())


@needs_fork
@pytest.mark.parametrize("objective", ["trajectory", "consistency"])
def test_killed_and_resumed_it_is_the_uninterrupted_run(tmp_path, objective):
    images, at, folder = png_folder(tmp_path / "images"), random.randrange(2, 8), tmp_path / "killed"
    made = partial(DistillationTask, teacher=teacher())

    def go(folder, **options):
        return run(folder, images, decoder=student(objective), task=made, **options)

    whole = go(tmp_path / "whole")
    assert forked(lambda: go(folder, on_batch=kill_at(at))) == [-9]
    resumed = go(folder)
    assert losses(folder) == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))


def test_a_card_keeps_how_a_student_was_made(tmp_path):
    told = {"steps": 1, "distilled": Distilled(objective="consistency", teacher_steps=30)}
    save_bundle(tmp_path / "d.safetensors", tiny_decoder(**told))
    found = read_card(tmp_path / "d.safetensors")
    assert found == tiny_decoder(**told).card and found.distilled.teacher_steps == 30
    assert load_decoder(tmp_path / "d.safetensors").card == found
    assert "distilled" not in tiny_decoder().card.to_dict()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 4}, "a student takes fewer steps than its teacher, got 4 and 4"),
        ({"condition_dropout": 0.1}, "a student has no null condition, got condition_dropout 0.1"),
        ({"condition_guidance": 2.0}, "is a student, which paints with the guidance that its teacher had"),
        ({"distilled": {"objective": "trajectory"}}, "distilled must be an objective and a number of steps or None"),
    ],
    ids=str,
)
def test_a_card_that_no_student_has_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        student(**changes)


@pytest.mark.parametrize(("objective", "steps"), [("adversarial", 5), ("trajectory", 1), ("trajectory", 2.5)])
def test_how_a_student_was_made_checks_itself(objective, steps):
    with pytest.raises(ValueError, match=r"(objective|teacher_steps) must be .*, got"):
        Distilled(objective=objective, teacher_steps=steps)


# --- train.py distill -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return png_folder(tmp_path_factory.mktemp("images") / "folder", count=24, side=48)


@pytest.fixture
def distilled(pico, images, tmp_path, monkeypatch):
    """`train.py distill` of the embedded decoder, which takes 4 steps; a None takes an option's default away."""
    monkeypatch.setattr(embedded, "WEIGHTS", pico)

    def call(*words, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(command(images, tmp_path, *words, **changes))

    return call


def command(images, folder, *words, **changes) -> list[str]:
    options = {"vlm": "pico", "data": images, "out": folder / "run", "steps": 2, "batch": 2, "log-every": 1}
    options |= {"samples": 0, "precision": "no", "held-out": 0.05, "warmup": 1, "sample-every": 2, "save-every": 1}
    options |= {"student-steps": 1, "learning-rate": 1e-3}
    options = {name: value for name, value in (options | changes).items() if value is not None}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["distill", *words, "--cpu", *flags]


def counted(monkeypatch):
    """The times at which decoders are asked for a velocity."""
    found, forward = [], DistributionConditionedDecoder.forward
    monkeypatch.setattr(
        DistributionConditionedDecoder,
        "forward",
        lambda self, packed, context, condition, t, size: (
            found.append(t[0].item()) or forward(self, packed, context, condition, t, size)
        ),
    )
    return found


def test_a_student_is_made_resumed_and_painted_with(distilled, pico, images, tmp_path, capsys, monkeypatch):
    assert distilled(samples=1) == 0
    said = capsys.readouterr().out
    assert "run: a student of 1 step from a teacher of 4, objective trajectory\n" in said
    assert "run: the student's times: 1, 0\n" in said and f"wrote {tmp_path / 'run' / 'best.safetensors'}" in said
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as sheet:
        assert sheet.size == (3 * 96, 96)
    log, bundle = read_log(tmp_path / "run"), tmp_path / "run" / "decoder.safetensors"
    assert [line["step"] for line in log] == [1, 2] and log[1]["eval/loss"] > 0
    card, before = read_card(bundle), read_card(pico / "decoder.safetensors")
    taught = Distilled(objective="trajectory", teacher_steps=4)
    assert card == replace(before, steps=1, distilled=taught, tokenizer=card.tokenizer)

    shutil.copytree(tmp_path / "run", tmp_path / "later")
    shutil.rmtree(tmp_path / "later" / "checkpoints" / "step-00000002")
    assert distilled(out=tmp_path / "later", samples=1) == 0
    assert losses(tmp_path / "later") == losses(tmp_path / "run")
    assert distilled("--bundle-now") == 0
    now = load_file(tmp_path / "run" / "decoder-step-00000002.safetensors")
    assert all(torch.equal(value, now[name]) for name, value in load_file(bundle).items())
    for changes, words in (
        ({"objective": "consistency"}, "card.distilled.objective 'trajectory' -> 'consistency'"),
        ({"student-steps": 2}, "card.steps 1 -> 2"),
        ({"shift": 1}, "card.shift None -> 1.0"),
    ):
        assert distilled(**changes) == 1
        assert words in capsys.readouterr().err

    times, image = counted(monkeypatch), str(next(images.glob("*.png")))
    models = ["--vlm", str(pico / "janus"), "--vae", str(pico / "vae"), "--decoder", str(bundle)]
    shown = ["reconstruct", image, *models, "--out", str(tmp_path / "out")]
    assert dcdd(shown) == 0
    assert times == [1.0] and "student" not in capsys.readouterr().err
    assert dcdd([*shown, "--steps", "3"]) == 0
    assert len(times) == 4
    assert capsys.readouterr().err.count("is a student that was made for 1 steps from noise") == 1


def test_a_student_of_the_consistency_objective_is_made_from_a_cache(distilled, tmp_path, images, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    cache = ["--vlm", "pico", "--data", str(images), "--out", str(tmp_path / "cache"), "--cpu"]
    assert main(["cache", *cache]) == 0
    options = {"data": None, "cache": tmp_path / "cache", "localised": 0, "student-steps": 2, "teacher-steps": 6}
    assert distilled(objective="consistency", shift=1.5, train="adapter", **options) == 0
    card = read_card(tmp_path / "run" / "decoder.safetensors")
    assert (card.steps, card.shift) == (2, 1.5)
    assert card.distilled == Distilled(objective="consistency", teacher_steps=6)
    assert "the student's times: 1, 0.818, 0\n" in capsys.readouterr().out


def test_a_student_takes_over_what_its_teacher_is_served_with(distilled, pico, tmp_path):
    """Its guidance on the condition is built in; distribution guidance was chosen for the teacher's steps."""
    bundle, served = tmp_path / "guided.safetensors", {"condition_dropout": 0.1, "condition_guidance": 1.5}
    card = replace(
        read_card(pico / "decoder.safetensors"), **served, distribution_guidance=ServedGuidance(strength=0.1)
    )
    with torch.random.fork_rng():
        save_bundle(
            bundle, DistributionConditionedDecoder.build(replace(card, shift=2.5, licence="mine", reads="logits"))
        )
    assert distilled(bundle=bundle, steps=1) == 0
    found = read_card(tmp_path / "run" / "decoder.safetensors")
    assert (found.condition_dropout, found.condition_guidance, found.distribution_guidance) == (0, 1, None)
    assert (found.shift, found.licence, found.reads) == (2.5, "mine", "logits")
    assert not [name for name in load_file(tmp_path / "run" / "decoder.safetensors") if "null" in name]


def launched(weights: Path, words: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    embedded.WEIGHTS = weights
    assert main(words) == 0


@needs_fork
def test_two_processes_make_a_student(pico, images, tmp_path):
    assert forked(partial(launched, pico, command(images, tmp_path)), world=2, clean=True) == [0, 0]
    assert read_card(tmp_path / "run" / "decoder.safetensors").steps == 1
    told = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "training.json").read_text())["settings"]
    assert told["processes"] == 2 and told["teacher"] and len(read_log(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"student-steps": 4}, "a student takes fewer steps than its teacher, got 4 and 4: give fewer --student-steps"),
        ({"student-steps": 2, "teacher-steps": 2}, "takes fewer steps than its teacher, got 2 and 2"),
        ({"student-steps": 0}, "student-steps must be a whole number in 1..1,000, got 0: 1, 2 or 4"),
        ({"teacher-steps": 1}, "teacher-steps must be a whole number in 2..1,000"),
        ({"shift": 99}, "shift must be a finite number in -16.0..16.0 or None, got 99"),
        ({"resolution": 64}, "a student has its teacher's resolution, 96, got 64: leave it out"),
        (
            {"bundle": "student"},
            "student.safetensors is a student of 2 steps, which is neither trained on nor a teacher",
        ),
        ({"bundle": "nowhere"}, "nowhere does not exist"),
        ({"vlm": "janus", "vae": "vae"}, "there is nothing to distil: give a decoder bundle (--bundle), the teacher"),
        ({"student-steps": 3, "shift": 16}, "leave no way to go between two of them"),
    ],
    ids=str,
)
def test_what_cannot_be_distilled_is_refused_in_words(distilled, pico, tmp_path, capsys, options, words):
    places = {"student": tmp_path / "student.safetensors", "nowhere": tmp_path / "nowhere"}
    places |= {"janus": pico / "janus", "vae": pico / "vae"}
    save_bundle(places["student"], student())
    assert distilled(**{name: places.get(value, value) for name, value in options.items()}) == 1
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_student_is_not_trained_on_images(pico, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "WEIGHTS", pico)
    save_bundle(tmp_path / "student.safetensors", student())
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--vlm", "pico", "--data", str(images), "--out", str(tmp_path / "run"), "--cpu"]
    assert main([*words, "--bundle", str(tmp_path / "student.safetensors")]) == 1
    assert "start from the decoder that it was made of" in capsys.readouterr().err


def test_a_distillation_checks_its_numbers():
    for wrong in ({"objective": "shortcut"}, {"steps": 0}, {"teacher_steps": 1}, {"shift": float("nan")}):
        with pytest.raises(ValueError, match=r"must be .*, got"):
            DistillationConfig(**wrong)


def test_what_the_teacher_s_card_adds_is_a_setting(tmp_path):
    """Of older runs, which do not say, it is not asked."""
    for shift, told in ((3.0, 3.0), (None, "the backbone's")):
        guided = teacher(condition_dropout=0.1, condition_guidance=1.5, shift=shift)
        now = task_of(student(), by=guided).settings
        assert (now[TEACHER_GUIDANCE], now[TEACHER_SHIFT]) == (1.5, told)
    now = {**now, "batch": 1, "processes": 1, "recipe": {"steps": 5, "accumulation": 1}}
    older = {name: value for name, value in now.items() if name not in (TEACHER_GUIDANCE, TEACHER_SHIFT)}
    assert _continued(older, now) == now
    for other in ({TEACHER_GUIDANCE: 1.0}, {TEACHER_SHIFT: 3.0}):
        with pytest.raises(ValueError, match=f"{next(iter(other))} .* -> "):
            require_same_settings("it was", _continued(now | other, now), now, remedy="go back")
