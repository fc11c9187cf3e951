"""`train.py progressive` on tiny models: from captioned images to the folder of a masked sampler."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

from dcdd_core import registry
from dcdd_core.cli import train_progressive, training_options
from dcdd_core.cli.train import main, parser
from dcdd_core.models.janus.masked_start import TEMPLATE
from dcdd_core.protocols import SamplingOptions
from dcdd_core.training.batches import Batches, DataShard, Entry
from dcdd_core.training.cache import EncodingCache
from dcdd_core.training.captions import Captions
from dcdd_core.training.config import DataConfig, OptimizationConfig, RunConfig
from dcdd_core.training.image_batch import Geometry
from dcdd_core.training.log import read_log
from dcdd_core.training.masked_plan import MaskedPlan
from dcdd_core.training.masked_task import (
    ErrorScale,
    MaskedTask,
)
from dcdd_core.training.sources import open_images
from tests.models.masked.tiny_masked import save_tiny_masked
from tests.tiny import fill, save_janus, tiny_janus, tiny_tokenizer, tiny_vq
from tests.training.runs import CAPTIONS, caption_of, captioned_folder, forked, launched, losses, png_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
UNEVALUATED = {"sample-every": 0}


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Path:
    return save_janus(tmp_path_factory.mktemp("models") / "janus")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """24 images with captions."""
    return captioned_folder(tmp_path_factory.mktemp("images") / "folder")


def parquet_of(images: Path, path: Path, column: str = "caption") -> Path:
    files = sorted(images.glob("*.png"))
    columns = {"image": [file.read_bytes() for file in files], column: [caption_of(i) for i in range(len(files))]}
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


def tar_of(images: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for index, file in enumerate(sorted(images.glob("*.png"))):
            for suffix, content in (("png", file.read_bytes()), ("txt", caption_of(index).encode())):
                info = tarfile.TarInfo(f"{file.stem}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def command(vlm: Path, data: Path | None, out: Path, *words: str, **changes) -> list[str]:
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {
        **{"vlm": vlm, "data": data, "out": out, "steps": 4, "batch": 3, "width": 32, "layers": 1, "heads": 2},
        **{"log-every": 1, "samples": 0, "warmup": 1, "precision": "no", "sample-every": 4},
    }
    options = {name: value for name, value in (options | changes).items() if value is not None}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["progressive", *words, "--cpu", *flags]


@pytest.fixture
def run(janus, images, tmp_path):
    """`train.py progressive` on the tiny models; a None takes an option's default away."""

    def call(*words, **changes):
        options = {"vlm": janus, "data": images, "out": tmp_path / "run"} | changes
        vlm, data, out = (options.pop(name) for name in ("vlm", "data", "out"))
        return main(command(vlm, data, out, *words, **options))

    return call


def sampler_in(folder: Path):
    return registry.sampler_family(folder).load_sampler(str(folder))


def test_a_folder_of_captioned_images_becomes_a_sampler_that_paints(run, images, janus, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "05.txt").unlink()
    (tmp_path / "images" / "06.txt").write_text(" \n")
    assert run(data=tmp_path / "images", samples=2, steps=8) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "run" / "sampler"
    assert f"wrote {folder}, of step 8" in said
    assert "run: 2 images have no caption and are left out: 05.png, 06.png" in said
    assert f"run: all of them are named in {tmp_path / 'run' / 'left_out.json'}" in said
    record = json.loads((tmp_path / "run" / "left_out.json").read_text())
    assert record["uncaptioned"] == ["05.png", "06.png"] and not record["unreadable"]
    # Finished: what was left out is known from the checkpoint.
    assert run(data=tmp_path / "images", samples=2, steps=8) == 0
    assert "run: 2 images have no caption and are left out: 05.png, 06.png" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "left_out.json").read_text()) == record
    with Image.open(tmp_path / "run" / "samples" / "step-00000008.png") as sheet:
        assert sheet.size == (2 * 16, 2 * 16), "images beside their samples"
    # It does not need the folder that it was trained from.
    moved = shutil.move(folder, tmp_path / "moved")
    sampler = sampler_in(moved)
    drawn = sampler.sample(["a red circle"], seeds=[1], options=SamplingOptions(guidance=2.0))
    tokenizer = registry.sampler_family(moved).load_tokenizer(str(moved))
    assert tokenizer.codebook.fingerprint == drawn.codebook and drawn.grid == (4, 4)
    assert tokenizer.decode_tokens(drawn.tokens, drawn.grid).shape == (1, 3, 16, 16)
    assert sampler.name == "run" and sampler.words.template == "{prompt}"
    card = (Path(moved) / "README.md").read_text()
    assert "| updates | 8 of 3 images" in card and "| held-out loss |" in card and "| started from | random" in card
    lines = read_log(tmp_path / "run")
    assert {"loss", "hidden", "wrong", "error", "importance", "gradient_norm"} <= set(lines[0])
    assert {"eval/loss", "eval/hidden", "eval/wrong"} <= set(lines[-1])
    best = min((line for line in lines if "eval/loss" in line), key=lambda line: line["eval/loss"])
    assert f"wrote {tmp_path / 'run' / 'best'}, of step {best['step']}, the lowest held-out loss" in said
    kept = load_file(tmp_path / "run" / "best" / "model.safetensors")
    average = load_file(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in average.items())


@pytest.mark.parametrize("kind", ["parquet", "column", "webdataset", "saved"])
def test_parquet_webdataset_and_saved_datasets_train_too(run, images, tmp_path, capsys, kind):
    options = {}
    if kind == "parquet":
        data = parquet_of(images, tmp_path / "train.parquet")
    elif kind == "column":
        data, options = parquet_of(images, tmp_path / "train.parquet", "said"), {"caption-column": "said"}
    elif kind == "webdataset":
        data = tar_of(images, tmp_path / "shard.tar")
    else:
        data = tmp_path / "saved"
        files = sorted(images.glob("*.png"))
        rows = {"image": [file.read_bytes() for file in files], "text": [caption_of(i) for i in range(len(files))]}
        Dataset.from_dict(rows).save_to_disk(data)
    seen = []
    original = MaskedTask.example

    def example(self, batch, generator, averaged):
        seen.extend(batch.captions)
        return original(self, batch, generator, averaged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedTask, "example", example)
        assert run(data=data, steps=2, **options) == 0
    assert len(seen) == 6 and set(seen) <= set(CAPTIONS)
    assert sampler_in(tmp_path / "run" / "sampler").grid == (4, 4)
    assert "have no caption" not in capsys.readouterr().out


def test_each_image_comes_with_its_own_caption(images, tmp_path):
    geometry = Geometry(resolution=16, token_resolution=16, token_factor=4, vae_factor=1)
    paths = [images, parquet_of(images, tmp_path / "a.parquet"), tar_of(images, tmp_path / "a.tar")]
    wanted = {}
    for path in paths:
        source = open_images(path, geometry, captions=Captions())
        batches = iter(Batches(source, size=6, shard=DataShard(seed=3, window=5)))
        for _ in range(4):
            batch = next(batches)
            for pixels, caption in zip(batch.pixels, batch.captions):
                wanted.setdefault(pixels.numpy().tobytes(), set()).add(caption)
    assert len(wanted) == 24 and all(len(captions) == 1 for captions in wanted.values())
    assert (
        open_images(images, geometry).load(next(open_images(images, geometry).entries(DataShard(), 0))).caption is None
    )


def test_a_cache_with_captions_trains_as_the_images_do(run, janus, images, tmp_path, capsys):
    def cache(out, *words, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {"vlm": janus, "data": images, "out": out, "shard-size": 10} | changes
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return main(["cache", *words, "--cpu", *flags])

    assert cache(tmp_path / "cache", "--captions") == 0
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["captions"] and manifest["complete"] and manifest["card"]["autoencoder"] is None
    assert set(load_file(tmp_path / "cache" / "shards" / "00000.safetensors")) == {"features"}
    for name, data in (("direct", {}), ("cached", {"data": None, "cache": tmp_path / "cache"})):
        assert run(out=tmp_path / name, steps=3, **data) == 0
    direct, cached = (losses(tmp_path / name) for name in ("direct", "cached"))
    for one, other in zip(direct, cached, strict=True):
        assert other == pytest.approx(one, rel=5e-2)
    header = EncodingCache._header
    for damaged in (None, ["a"], [5] * 10):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EncodingCache, "_header", lambda *given, new=damaged: header(*given) | {"captions": new})
            with pytest.raises(ValueError, match="00000.safetensors has the captions .*, expected 10 texts"):
                EncodingCache(tmp_path / "cache").load(Entry("0", 0))
    gap = shutil.copytree(images, tmp_path / "images")
    (gap / "05.txt").unlink()
    for said in ("shard 2 with 4 images", "keeping 3 finished shards"):
        capsys.readouterr()
        assert cache(tmp_path / "gap", "--captions", data=gap) == 0
        out = capsys.readouterr().out
        assert said in out and "1 images have no caption and are left out: 05.png" in out
    held = json.loads((tmp_path / "gap" / "manifest.json").read_text())
    assert held["complete"] and held["items"] == 23
    (gap / "05.txt").write_text("a red circle")  # Added later: its shard is made again.
    assert cache(tmp_path / "gap", "--captions", data=gap) == 0
    assert "00000.safetensors lacks images that had no caption and have changed" in capsys.readouterr().err
    assert json.loads((tmp_path / "gap" / "manifest.json").read_text())["items"] == 24
    blank = png_folder(tmp_path / "blank", count=3)
    for path in blank.glob("*.png"):
        path.with_suffix(".txt").write_text(" ")
    for _ in range(2):  # The second time nothing is read.
        assert cache(tmp_path / "nothing", "--captions", data=blank) == 1
        assert "none of the 3 images of" in (said := capsys.readouterr().err) and "and 3 have no caption" in said
    assert cache(tmp_path / "bare", "--captions", "--keep-pixels") == 1
    assert "--keep-pixels would do nothing without --vae" in capsys.readouterr().err
    assert cache(tmp_path / "cache", "--captions", resolution=32) == 1
    assert "its resolution is 16, expected 32" in capsys.readouterr().err
    assert cache(tmp_path / "bare", **{"caption-column": "text"}) == 1
    assert "--caption-column would do nothing without --captions" in capsys.readouterr().err
    assert run(data=None, cache=tmp_path / "cache", side=32, out=tmp_path / "other") == 1
    assert "its token resolution is 16, expected 32" in capsys.readouterr().err
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "captions"}))
    assert run(data=None, cache=tmp_path / "cache", out=tmp_path / "other") == 1
    assert "it has no captions, as it was written without --captions" in capsys.readouterr().err


def at_batch(number: int, act) -> None:
    """From now on, in this process, `act` is called before that batch becomes an example."""
    original, seen = MaskedTask.example, iter(range(10**6))

    def example(self, batch, generator, averaged):
        if next(seen) == number:
            act()
        return original(self, batch, generator, averaged)

    MaskedTask.example = example


def killed(words: list[str], number: int) -> None:
    at_batch(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    main(words)


@needs_fork
def test_killed_and_resumed_it_is_the_uninterrupted_run(run, janus, images, tmp_path):
    options = {"steps": 6, "sample-every": 3, "save-every": 2, "accumulate": 2, "optimizer": "muon"}
    assert run(out=tmp_path / "whole" / "run", **options) == 0
    words = command(janus, images, tmp_path / "cut" / "run", **options)
    assert forked(partial(killed, words, 9)) == [-signal.SIGKILL]
    leftover = tmp_path / "cut" / "run" / "sampler" / "model.safetensors.01234567.tmp"
    leftover.parent.mkdir()
    leftover.touch()  # As of a process that was killed while it wrote the sampler.
    assert run(out=tmp_path / "cut" / "run", **options) == 0
    assert losses(tmp_path / "cut" / "run") == losses(tmp_path / "whole" / "run")
    one, other = (tmp_path / name / "run" / "sampler" / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
    assert not leftover.exists()
    assert "| updates | 6 of 6 images" in (leftover.parent / "README.md").read_text()


def test_sigterm_ends_it_with_a_checkpoint_from_which_it_goes_on(run, tmp_path, monkeypatch, capsys):
    assert run(out=tmp_path / "whole" / "run") == 0
    with monkeypatch.context() as patch:
        patch.setattr(MaskedTask, "example", MaskedTask.example)  # restored afterwards
        at_batch(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run() == 143
    assert "run: stopped by SIGTERM after step 3 of 4" in capsys.readouterr().out
    assert run("--sampler-now") == 0
    assert sampler_in(tmp_path / "run" / "sampler-step-00000003").grid == (4, 4)
    # Another device could find another scale: that of the beginning is kept.
    monkeypatch.setattr(ErrorScale, "of", None)
    assert run() == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole" / "run")


def test_the_weights_that_draw_wrong_tokens_are_the_ema(run, tmp_path, monkeypatch):
    original, seen = MaskedTask.example, []

    def example(self, batch, generator, averaged):
        seen.append((averaged(lambda network: network.mask.detach().clone()), self.network.mask.detach().clone()))
        return original(self, batch, generator, averaged)

    monkeypatch.setattr(MaskedTask, "example", example)
    assert run(**{"save-every": 1, "keep": 4}, **UNEVALUATED) == 0
    for step, (average, trained) in list(enumerate(seen))[2:]:
        held = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08}" / "average.safetensors")
        assert torch.equal(average, held["mask"]) and not torch.equal(average, trained)


def test_mixed_precision_and_recomputed_activations_change_little(run, tmp_path):
    assert run(out=tmp_path / "plain", steps=1, **UNEVALUATED) == 0
    assert run("--checkpointing", out=tmp_path / "bf16", steps=1, precision="bf16", **UNEVALUATED) == 0
    plain, mixed = (losses(tmp_path / name)[0] for name in ("plain", "bf16"))
    assert mixed != plain and mixed[:3] == pytest.approx(plain[:3], rel=2e-2)


@needs_fork
def test_two_processes_train_together(janus, images, tmp_path):
    words = command(janus, images, tmp_path / "run", steps=2, batch=2)
    assert forked(partial(launched, words), world=2, clean=True) == [0, 0]
    assert sampler_in(tmp_path / "run" / "sampler").grid == (4, 4)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "position-1.json").exists()
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["eval/loss"] > 0


def test_the_loss_goes_down_on_a_few_images(run, tmp_path):
    few = captioned_folder(tmp_path / "few", count=3)
    options = {"learning-rate": 1e-2, "average-decay": 0.9, "drop-captions": 0, "log-every": 10, **UNEVALUATED}
    assert run(data=few, steps=60, width=64, **options) == 0
    found = [line["hidden"] for line in read_log(tmp_path / "run")]
    assert found[-1] < 0.6 * found[0]


def test_it_starts_from_a_masked_sampler_and_keeps_what_that_knows(run, tmp_path, capsys):
    start = save_tiny_masked(tmp_path / "start")
    sizes = dict.fromkeys(("width", "layers", "heads"))
    assert run(**sizes, **{"start-from": start, "learning-rate": 1e-9, "steps": 1, **UNEVALUATED}) == 0
    before, after = sampler_in(start), sampler_in(tmp_path / "run" / "sampler")
    assert after.words.template == before.words.template == TEMPLATE and after.sampling == before.sampling
    for name, value in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert "| started from | start |" in (tmp_path / "run" / "sampler" / "README.md").read_text()
    assert run(**sizes, **{"start-from": start, "side": 32, "out": tmp_path / "other"}) == 1
    assert "paints 4 x 4 tokens, and images of 32 pixels have 8 x 8: give --side 16" in capsys.readouterr().err
    other = save_janus(tmp_path / "other-janus", seed=5)
    assert run(**sizes, **{"start-from": start, "vlm": other, "out": tmp_path / "other"}) == 1
    assert "has the codes of another image tokenizer" in capsys.readouterr().err


def test_it_starts_from_a_janus_whose_heads_have_their_own_keys(run, janus, tmp_path, capsys):
    sizes = dict.fromkeys(("width", "layers", "heads"))
    assert run(**sizes, **{"start-from": janus}) == 1
    assert "2 key heads for 4 heads" in capsys.readouterr().err
    model, words = tiny_janus()
    model.config.text_config.num_key_value_heads = 4
    own = fill(JanusForConditionalGeneration(model.config))
    own.save_pretrained(tmp_path / "janus")
    words.save_pretrained(tmp_path / "janus")
    options = {"start-from": tmp_path / "janus", "vlm": tmp_path / "janus", "learning-rate": 1e-9, "steps": 1}
    for side, grid in ((None, (4, 4)), (32, (8, 8))):
        out = tmp_path / f"{side}"
        assert run(**sizes, **options, side=side, out=out, **{"min-side": 1}, **UNEVALUATED) == 0
        sampler = sampler_in(out / "sampler")
        assert sampler.grid == grid and sampler.words.template == TEMPLATE and sampler.sampling.guidance == 3.0
        began = sampler.model.layers[1].k.weight, own.model.language_model.layers[1].self_attn.k_proj.weight
        torch.testing.assert_close(*began, rtol=0, atol=1e-6)


def test_a_tokenizer_alone_needs_words_from_elsewhere(run, janus, tmp_path, capsys):
    tiny_vq().save_pretrained(tmp_path / "vq")
    assert run(vlm=tmp_path / "vq") == 1
    assert (
        f"{tmp_path / 'vq'} has no text tokenizer (tokenizer.json): give the folder of one" in capsys.readouterr().err
    )
    assert run(vlm=tmp_path / "vq", steps=1, **{"text-tokenizer": janus}, **UNEVALUATED) == 0
    assert sampler_in(tmp_path / "run" / "sampler").words.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_an_estimate_is_of_the_very_options_and_starts_nothing(run, tmp_path, capsys, monkeypatch):
    assert run("--estimate", precision=None, gpu="h100", gpus=2, steps=100) == 0
    said = capsys.readouterr().out
    assert "width 32, 1 blocks, 2 heads" in said and "16 pixels, 16 tokens of 64 codes" in said
    assert "updates                                      100  of 6 images" in said and "communication" in said
    assert not (tmp_path / "run").exists()
    setups = []
    monkeypatch.setattr(train_progressive, "masked_cost", lambda setup, _: setups.append(setup) or 1 / 0)
    for options in ({}, {"corruptions": "samples", "optimizer": "muon", "accumulate": 2}):
        with pytest.raises(ZeroDivisionError):
            run("--estimate", precision=None, gpus=2, **options)
    one, other = setups
    assert (one.drawn, one.words, one.batch, one.gpus, one.cached) == (1 / 3, 128, 3, 2, False)
    assert (one.precision, one.optimizer, one.accumulate) == ("bf16", "adamw", 1)
    assert (other.drawn, other.optimizer, other.accumulate) == (1, "muon", 2)
    monkeypatch.undo()
    assert run("--estimate") == 1
    assert "give --tflops for training without mixed precision" in capsys.readouterr().err
    assert run("--estimate", precision=None, memory=1e-3) == 0
    assert "does NOT fit: try --checkpointing" in capsys.readouterr().out


def test_the_options_have_the_defaults_that_are_published():
    args = parser("train.py").parse_args(["progressive", "--vlm", "pico", "--data", "images", "--out", "run"])
    assert (args.steps, args.batch, args.learning_rate, args.warmup) == (50_000, 32, 3e-4, 500)
    assert (args.weight_decay, args.average_decay, args.optimizer) == (0.05, 0.999, "adamw")
    assert (args.drop_captions, args.caption_tokens, args.mask_schedule) == (0.1, 128, "arccos")
    assert tuple(args.corruptions) == ("shuffled", "nearest", "samples")


def test_every_option_reaches_what_it_is_named_after():
    words = "--steps 9 --accumulate 2 --learning-rate 0.01 --warmup 3 --weight-decay 0.3 --clip 2 --average-decay 0.5"
    words += " --seed 7 --optimizer muon --checkpointing --column jpg --batch 5 --window 6 --workers 1 --min-side 4"
    words += " --skip-unreadable 0.2 --samples 1 --sample-every 4 --save-every 3 --log-every 2 --keep 8 --held-out 0.1"
    args = parser("train.py").parse_args(f"progressive --vlm pico --data images --out run {words}".split())
    assert training_options.optimization_config(args) == OptimizationConfig(
        steps=9,
        accumulation=2,
        learning_rate=0.01,
        warmup=3,
        weight_decay=0.3,
        clip=2,
        ema_decay=0.5,
        seed=7,
        optimizer="muon",
        activation_checkpointing=True,
    )
    data = {"images": "images", "column": "jpg", "batch": 5, "window": 6, "workers": 1, "min_side": 4}
    assert training_options.data_config(args) == DataConfig(**data, skip_unreadable=0.2)
    every = {"sample_every": 4, "save_every": 3, "log_every": 2}
    assert training_options.run_config(args) == RunConfig(samples=1, **every, keep=8, held_out=0.1)


def test_out_of_memory_says_what_this_training_can_do(run, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(MaskedPlan, "tokenizer", full)
    assert run() == 1
    said = capsys.readouterr().err
    assert "a smaller --batch and as much more --accumulate" in said and "lora" not in said


def test_a_run_is_not_resumed_with_other_masking_words_or_sizes(run, tmp_path, capsys):
    assert run(steps=1) == 0
    for changes, words in (
        ({"drop-captions": 0.2}, "masking.dropped 0.1 -> 0.2"),
        ({"mask-schedule": "linear"}, "masking.schedule 'arccos' -> 'linear'"),
        ({"layers": 2}, "network.layers 1 -> 2"),
        ({"template": "an image of {prompt}"}, "template '{prompt}' -> 'an image of {prompt}'"),
    ):
        assert run(steps=1, **changes) == 1
        assert words in capsys.readouterr().err
    assert run("--sampler-now", steps=1, layers=2) == 1
    assert "network.layers 1 -> 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vlm": "nowhere"}, "nowhere does not exist; expected a VLM"),
        ({"start-from": "nowhere", "width": None, "layers": None, "heads": None}, "nowhere does not exist; expected a"),
        ({"text-tokenizer": "nowhere"}, "nowhere does not exist; expected the folder of a text tokenizer"),
        ({"start-from": "nowhere"}, "--width, --layers, --heads would do nothing: the network of --start-from has its"),
        ({"width": 30, "heads": 4}, "a width of 30 is no even multiple of 4 heads: use 32, or other --heads"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"side": 0}, "side must be at least 1, got 0"),
        ({"steps": 0}, "steps and accumulation must be at least 1, got 0 and 1"),
        ({"drop-captions": 1.5}, "drop-captions must be a finite number in 0..1, got 1.5"),
        ({"caption-tokens": 2}, "caption-tokens must be a whole number in 8..4,096, got 2"),
        ({"gpus": 2, "tflops": 5}, "--gpus, --tflops would do nothing without --estimate: give that too"),
        ({"gpu": "h100", "utilisation": 0.5}, "--gpu, --utilisation would do nothing without --estimate: give that"),
        ({"template": "no place"}, 'template must hold "{prompt}" once'),
        ({"cache": "nowhere", "data": None, "caption-column": "text"}, "--caption-column would do nothing: what a"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_read(run, capsys, monkeypatch, options, words):
    monkeypatch.setattr(MaskedPlan, "tokenizer", None)
    assert run(**options) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_images_without_captions_are_a_clear_error(run, images, tmp_path, capsys):
    bare = png_folder(tmp_path / "bare", count=3)
    (bare / "notes.txt").write_text("no caption of an image")
    parquet = parquet_of(images, tmp_path / "a.parquet", "said")
    only = tmp_path / "only.tar"
    with tarfile.open(only, "w") as tar:
        tar.add(images / "00.png", "00.png")
    for changes, words in (
        ({"data": bare}, f"{bare} has no captions, which this training needs: no image has a text file"),
        ({"data": images, "caption-column": "text"}, "whose captions are in .txt files beside them: leave"),
        ({"data": parquet}, "has no captions, which this training needs: it has image, said"),
        ({"data": parquet, "caption-column": "no"}, "has no column 'no' of captions; it has image, said"),
        ({"data": only}, "has no captions, which this training needs: it has png"),
    ):
        assert run(**changes) == 1
        assert words in capsys.readouterr().err
    (bare / "00.txt").write_text(" ")
    assert run(data=bare) == 1
    assert "none of the 3 images of" in (said := capsys.readouterr().err) and "and 3 have no caption" in said
