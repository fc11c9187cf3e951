"""`train.py estimate`: what it prints, writes and refuses, on a small transformer."""

import argparse
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcdd_core.cli.train import main
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids
from dcdd_core.models.llamagen.sampler import LlamaGenSampler
from dcdd_core.training import estimate
from dcdd_core.training.cost import TrainingSetup, cost_of, meta_decoder
from dcdd_core.training.estimate import GPUS, Duration, add_arguments, duration_of, numbers, run, table
from dcdd_core.training.vlm_cost import PUBLISHED, JanusShape, LlamaGenShape
from tests.tiny import tiny_janus
from tests.tiny_llamagen import save_llamagen
from tests.training.runs import files_of_at_most
from tests.training.test_cost import CONFIG, SMALL

SIZES = ["--width", "32", "--resolution", "256", "--grid", "16", "--batch", "2"]


def said(*options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(options))


@pytest.fixture(scope="module")
def cost():
    return cost_of(TrainingSetup(**SMALL))


@pytest.fixture
def base(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps(CONFIG | {"_class_name": "FluxTransformer2DModel"})
    )
    return ["--base", str(tmp_path)]


def test_it_prints_a_table_and_writes_the_same_as_json(tmp_path, base, cost, capsys):
    file = tmp_path / "out" / "e.json"
    said(*base, *SIZES, "--pictures", "1000", "--gpu", "h100", "--json", str(file))
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    assert written["peak"] == cost.peak and sum(written["memory"].values()) == sum(cost.memory.values())
    assert written["fits"] and written["memory"]["trained weights"] == cost.memory["trained weights"]
    assert written["setup"]["config"] == CONFIG and written["setup"]["train"] == "attention"
    assert written["run"]["updates"] == 500 and written["gpu_memory"] == 80 * 2**30
    assert (written["encoding"], written["kept"]) == (cost.encoding, cost.activations)
    assert (written["operations"], written["forward_operations"]) == (cost.flops, cost.forward_flops)
    assert written["memory"]["moving average"] == cost.memory["EMA"] and written["run"]["pictures"] == 1000
    for words in (
        "optimiser's states",
        "autoencoder, in float32",
        "encoding a batch",
        f"{cost.peak / 1e9:>8.2f}",
        "fits",
        "35% of 989 TFLOP/s",
        f"wrote {file}",
    ):
        assert words in printed


def test_a_full_disk_is_reported_and_the_old_json_stays(tmp_path, base, capsys):  # capsys: prints go into no file
    file = tmp_path / "e.json"
    file.write_text("before")
    with files_of_at_most() as limit, pytest.raises(OSError, match=r"e\.json could not be written .*; make room"):
        limit(100)
        said(*base, *SIZES, "--json", str(file))
    assert file.read_text() == "before" and list(tmp_path.glob("e.json*")) == [file]


def test_time_follows_from_flops_peak_and_utilisation(cost):
    setup = TrainingSetup(**SMALL, accumulate=2, gpus=4)
    found = duration_of(setup, cost, images=1601, teraflops=100.0, utilisation=0.5)
    seconds = cost.flops / 50e12
    assert found == Duration(
        images=1601,
        batch=16,
        updates=101,
        teraflops=100.0,
        utilisation=0.5,
        seconds=seconds,
        hours=101 * seconds / 3600,
    )


def test_an_hour_by_hand():
    """35 TFLOPs at 35 % of 100 TFLOP/s take a second; 57,617 images, 16 at a time, are 3,602 updates."""
    setup = TrainingSetup(**SMALL | {"batch": 2}, accumulate=2, gpus=4)
    found = duration_of(setup, SimpleNamespace(flops=35e12), images=57_617, teraflops=100.0, utilisation=0.35)
    assert (found.batch, found.updates) == (16, 3602)
    assert found.seconds == pytest.approx(1.0) and found.hours == pytest.approx(3602 / 3600)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_training_may_take_92_percent_of_the_memory(cost, spare, fits):
    memory = math.ceil(cost.peak / 0.92) + 1 + spare * 10
    duration = duration_of(TrainingSetup(**SMALL), cost, images=1, teraflops=1.0, utilisation=1.0)
    assert ("does NOT fit" not in table(TrainingSetup(**SMALL), cost, duration, memory)) is fits
    assert numbers(TrainingSetup(**SMALL), cost, duration, memory)["fits"] is fits


def test_what_does_not_fit_is_told_with_what_is_left_to_try(cost):
    duration = duration_of(TrainingSetup(**SMALL), cost, images=1, teraflops=1.0, utilisation=1.0)
    text = table(
        TrainingSetup(**SMALL, gpus=2), cost, duration, memory=cost.peak
    )  # no room is left for what is not counted
    assert "does NOT fit" in text and "--checkpointing" in text and "--sharding fsdp" in text
    least = TrainingSetup(**SMALL | {"batch": 1}, checkpointing=True, optimizer="adamw8bit", train="lora")
    assert "larger GPUs" in table(least, cost, duration, memory=cost.peak)
    assert "NOT" not in table(least, cost, duration, memory=2 * cost.peak)


def test_every_option_reaches_the_setup(base, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(estimate, "cost_of", lambda setup: seen.append(setup) or cost_of(setup))
    options = "--train lora --rank 3 --precision no --tflops 9 --checkpointing --accumulate 3 --optimizer adamw8bit"
    options += " --no-average --localised 0.5 --cached --sharding fsdp --gpus 2 --memory 5 --utilisation 0.5"
    options += " --student-steps 2 --teacher-steps 9 --objective consistency"
    said(*base, *SIZES, *options.split())
    wanted = {"rank": 3, "train": "lora", "precision": "no", "checkpointing": True, "accumulate": 3, "gpus": 2}
    wanted |= {"optimizer": "adamw8bit", "average": False, "localised": 0.5, "cached": True, "sharding": "fsdp"}
    wanted |= {"student_steps": 2, "teacher_steps": 9, "objective": "consistency"}
    assert seen == [TrainingSetup(**SMALL, **wanted)]
    assert "50% of 9 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "no"], "--tflops"),
        (["--memory", "inf"], "memory must be a finite number"),
        (["--memory", "0"], "memory must be a finite number"),
        (["--tflops", "inf"], "tflops must be a finite number"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--utilisation", "1.5", *SIZES], "utilisation in (0, 1]"),
        (["--base", "/nowhere"], "/nowhere"),
        (["--grid", "1" + "0" * 30], f"grid must be at most 65,536, got {10**30:,}"),
        (["--gpus", "65537"], "gpus must be at most 65,536, got 65,537"),
        (["--pictures", "1" + "0" * 16], "pictures must be a whole number in 1..1,000,000,000,000,000, got 1000"),
        (["--teacher-steps", "20"], "--teacher-steps would do nothing without --student-steps"),
        (["--objective", "consistency"], "--objective would do nothing without --student-steps"),
        (["--student-steps", "30"], "a student takes fewer steps than its teacher, got 30 and 30"),
        (["--student-steps", "-1"], "student-steps must be a whole number in 0..1,000"),
        (["--grid", "65536"], "beyond what can be counted (Storage size calculation overflowed"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, words, base):
    with pytest.raises(ValueError, match=re.escape(words)):
        said(*base, *options)


@pytest.mark.parametrize("option", ["base", "json"])
@pytest.mark.parametrize("text", ["", " "])
def test_a_path_that_is_empty_is_refused(option, text, capsys):
    with pytest.raises(SystemExit):
        main(["estimate", f"--{option}", text])
    assert f"argument --{option}: expected a path, got {text!r}" in capsys.readouterr().err


def test_nothing_is_drawn_for_an_estimate(base, capsys):
    """The noise of these images would take 18 TB."""
    said(*base, "--width", "32", "--grid", "16", "--resolution", "4096", "--batch", "65536")
    assert "65536 images x 1 x 1 GPU; 4096 pixels" in capsys.readouterr().out


def test_the_gpus_are_of_a_plausible_kind():
    assert all(10 < gpu.teraflops < 5000 and 8 <= gpu.memory <= 300 for gpu in GPUS.values())


def test_the_vlm_s_conditions_are_counted_at_every_step_or_once_in_the_cache(tmp_path, base, cost, capsys):
    file, options = tmp_path / "e.json", [*base, *SIZES, "--pictures", "1000", "--gpu", "h100"]

    def written(*more):
        said(*options, *more, "--json", str(file))
        return json.loads(file.read_text()), capsys.readouterr().out

    vlm, tokens = PUBLISHED["Janus-Pro-1B"], 16**2
    assert 2.9e9 < 2 * vlm.weights < 3.1e9 < 13e9 < 2 * PUBLISHED["Janus-Pro-7B"].weights < 13.4e9
    plain, printed = written()
    assert "VLM, in bfloat16" not in plain["memory"] and "caching_vlm_conditions" not in plain
    assert "Janus" not in printed
    found, printed = written("--vlm-conditions", "0.25")
    assert found["memory"]["VLM, in bfloat16"] == 2 * vlm.weights
    assert found["encoding"] == max(plain["encoding"], vlm.working_memory(2, tokens))
    assert found["operations"] - plain["operations"] == round(0.25 * 2 * vlm.flops(tokens))
    assert "Counted at every step: Janus-Pro-1B's pass over a share of 0.25 of the images." in printed
    without, _ = written("--cached")
    once, printed = written("--vlm-conditions", "0.25", "--cached", "--gpus", "4", "--vlm-model", "Janus-Pro-7B")
    assert once["memory"].keys() == without["memory"].keys() and once["operations"] == without["operations"]
    flops = PUBLISHED["Janus-Pro-7B"].flops(tokens)
    assert once["caching_vlm_conditions"]["operations"] == flops
    assert once["caching_vlm_conditions"]["hours_per_million"] == pytest.approx(
        1e6 * flops / (989e12 * 0.35) / 3600 / 4
    )
    assert "Before, once: Janus-Pro-7B in `train.py cache --vlm-conditions`, 16 images at a time" in printed
    with pytest.raises(ValueError, match="--vlm-model would do nothing without --vlm-conditions"):
        said(*options, "--vlm-model", "Janus-Pro-7B")
    with pytest.raises(ValueError, match="--rank would do nothing without --train lora"):
        said(*options, "--rank", "3")
    with pytest.raises(ValueError, match="vlm-conditions must be a finite number in 0..1, got 2"):
        said(*options, "--vlm-conditions", "2")


def test_a_student_costs_a_teacher_and_its_passes(base, cost, capsys):
    one = cost.forward_flops
    for objective, passes, of_student in (("trajectory", 10, 2 * 3), ("consistency", 1, 1 + 3)):
        setup = {"student_steps": 2, "teacher_steps": 10, "objective": objective}
        found = cost_of(TrainingSetup(**SMALL, train="all", **setup))
        assert found.flops / one == pytest.approx(passes + of_student, rel=0.02)
        teacher = found.memory["teacher"]
        decoder = meta_decoder(TrainingSetup(**SMALL))
        modulations = [name for name in decoder.state_dict() if "norm" in name and ".linear." in name]
        folded = [
            weight.numel()
            for name, weight in decoder.named_parameters()
            if name not in modulations and "time_text_embed" not in name
        ]
        assert len(modulations) == 6 and teacher == 2 * sum(folded)
        assert cost_of(TrainingSetup(**SMALL, optimizer="muon", **setup)).memory["teacher"] == teacher
        assert "teacher" not in cost.memory and found.peak > cost.peak + teacher
        said(*base, *SIZES, "--train", "all", "--student-steps", "2", "--teacher-steps", "10", "--objective", objective)
        words = f"a student of 2 steps, objective {objective}; its teacher of 10 makes {passes} passes over every micro"
        assert words in capsys.readouterr().out


@torch.no_grad()
def test_the_flops_of_the_vlm_are_those_that_pytorch_counts():
    """Of a teacher-forced pass of the tiny Janus, whose attention is made of products that are counted."""
    model, words = tiny_janus()
    sampler, prompt = JanusSampler(model, words), "a red circle"
    sizes = {"width": 32, "inner": 64, "layers": 2, "heads": 4, "key_heads": 2, "codes": 64}
    shape = JanusShape(**sizes, words=len(words), code_dim=8, prompt=len(prompt_ids(words, prompt)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sampler.teacher_forced([prompt], torch.zeros(1, 16, dtype=torch.int64))
    assert counter.get_total_flops() == shape.flops(16)
    parts = (model.model.language_model, model.model.generation_head, model.model.generation_aligner)
    parts += (model.model.generation_embeddings,)
    held = sum(weight.numel() for part in parts for weight in part.parameters() if weight.ndim > 1)
    assert shape.weights == held


@torch.no_grad()
def test_the_flops_of_llamagen_are_those_that_pytorch_counts(tmp_path):
    """Of a teacher-forced pass of the tiny LlamaGen, the text encoder's apart."""
    sampler, prompt = LlamaGenSampler.load(save_llamagen(tmp_path / "llamagen")), "a red circle"
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as first:
        sampler.teacher_forced([prompt], tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sampler.teacher_forced([prompt], tokens)
    assert first.get_total_flops() > counter.get_total_flops()  # its features are kept
    sizes = {"width": 32, "inner": 64, "layers": 2, "heads": 2, "key_heads": 2, "codes": 64, "text_width": 16}
    shape = LlamaGenShape(**sizes, text=0, prompt=len(prompt.split()) + 1)
    assert counter.get_total_flops() == shape.flops(16)
    encoded = LlamaGenShape(**sizes, text=1000, prompt=4).flops(16) - shape.flops(16)
    assert encoded == 2 * 4 * 1000
    held = sum(weight.numel() for weight in sampler.model.parameters() if weight.ndim > 1)
    assert shape.weights == held


def test_published_llamagen_is_as_large_as_its_files_say():
    """775 M parameters, as its authors' table of models says."""
    assert PUBLISHED["LlamaGen-XL"].weights / 1e6 == pytest.approx(775, rel=0.01)
