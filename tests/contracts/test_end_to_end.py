"""A family is one file: each goes through a training, the command line and the nodes without a line of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from diffusers import FluxTransformer2DModel
from PIL import Image

from dcdd_core import registry
from dcdd_core.cli import main
from dcdd_core.models.bundle import read_card
from dcdd_core.types import Calibration
from tests.comfy.graphs import Graph, output
from tests.contracts import toy_backbone, toy_codec, toy_vlm
from tests.contracts.conftest import save_vae
from tests.fake_comfy.fixture import double
from tests.tiny import fill, save_janus, tiny_flux_config
from tests.tiny_llamagen import save_llamagen

__all__ = ["double"]


def flux(folder: Path, channels: int) -> Path:
    """A FLUX.1-Fill of random weights for latents of so many channels at half the size."""
    config = {**tiny_flux_config(), "in_channels": 8 * channels + 16, "out_channels": 4 * channels}
    fill(FluxTransformer2DModel(**config)).save_pretrained(folder)
    return folder


def toy(folder: Path, channels: int) -> Path:
    config = {**toy_backbone.CONFIG, "channels": channels}
    with mock.patch.dict(toy_backbone.CONFIG, config):
        return toy_backbone.save(folder)


#: What is written for the VLM, the codec and the base, and the channels of the codec's latents.
WORLDS = {
    "LlamaGen": (save_llamagen, save_vae, flux, 16),
    "a VLM": (toy_vlm.save, save_vae, flux, 16),
    "a codec": (save_janus, toy_codec.save, flux, 12),
    "a backbone": (save_janus, save_vae, toy, 16),
    "all three": (toy_vlm.save, toy_codec.save, toy, 12),
}
PROMPT = "a red circle on the left"


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    """The files of one world, with images, a calibration, and a bundle of ten steps' training."""
    vlm, codec, base, channels = WORLDS[request.param]
    folder = tmp_path_factory.mktemp("world")
    vlm(folder / "vlm"), codec(folder / "vae"), base(folder / "base", channels)
    (folder / "images").mkdir()
    for k in range(4):
        noise = np.random.default_rng(k).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{k}.png")
    Calibration(scale=20.0, converged=True).save(folder / "calibration.safetensors")
    paths = {name: str(folder / name) for name in ("vlm", "vae", "base", "images")}
    with registry.added(toy_vlm.ToyVLM(), toy_codec.ToyCodecFamily(), toy_backbone.ToyBackboneFamily()):
        own = [f"--{name}={paths[name]}" for name in ("vlm", "vae", "base")]
        data = [f"--data={paths['images']}", f"--calibration={folder / 'calibration.safetensors'}"]
        length = ["--steps=10", "--batch=2", "--warmup=1", "--save-every=10", "--width=16", "--cpu"]
        trained = main(["train", *own, *data, *length, "--samples=1", "--sample-every=10", f"--out={folder / 'run'}"])
    assert trained == 0
    return folder


def test_ten_steps_train_a_decoder(world):
    lines = [json.loads(line) for line in (world / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 10 and np.isfinite(lines[-1]["loss"])
    assert len(list((world / "run" / "samples").glob("*.png"))) == 1
    card = read_card(world / "run" / "decoder.safetensors")
    assert card.resolution == 16 and card.vae_factor == 2
    assert card.base_config.get("_class_name") in (None, "ToyTransformer")


def test_dcdd_generates(world, tmp_path, capsys):
    models = ["--vlm", str(world / "vlm"), "--decoder", str(world / "run" / "decoder.safetensors")]
    models += ["--vae", str(world / "vae"), "--base", str(world / "base")]
    out = tmp_path / "a.png"
    assert main(["generate", PROMPT, *models, "--steps", "2", "--compare", "--out", str(out)]) == 0, capsys.readouterr()
    for name in ("a.png", "a-vq.png"):
        image = np.asarray(Image.open(tmp_path / name))
        assert image.shape == (16, 16, 3) and image.std() > 1


def test_the_nodes_paint(world, double, request):
    name = request.node.callspec.params["world"].replace(" ", "_")
    models = double.base / "models"
    for source, place in (
        ("vlm", models / "janus" / name),
        ("base", models / "diffusers" / name / "transformer"),
        ("vae", models / "diffusers" / name / "vae"),
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(world / source)
    (models / "dcdd").mkdir(exist_ok=True)
    (models / "dcdd" / f"{name}.safetensors").symlink_to(world / "run" / "decoder.safetensors")
    pack = double.pack.__name__
    own = sys.modules[f"{pack}.dcdd_core.registry"]
    families = [getattr(_of_pack(module, pack), family)() for module, family in _TOYS]
    graph = Graph(double.get("/object_info"))
    janus = graph.add("janus", "DCDD_LoadJanus", model=name)
    files = {"bundle": f"{name}.safetensors", "base_model": f"{name}/", "vae": f"{name}/"}
    decoder = graph.add("decoder", "DCDD_LoadDecoder", **files)
    sampled = graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, prompt=PROMPT, guidance=2.0, batch_size=2)
    vq = output(janus, 1)
    by_vq = graph.add("by_vq", "DCDD_VQVAEDecode", token_logits=sampled, vq_vae=vq)
    condition = graph.add("condition", "DCDD_LCDMEncoder", token_logits=sampled, vq_vae=vq, decoder=decoder)
    painted = graph.add("paint", "DCDD_FluxDecoder", decoder=decoder, condition=condition, steps=2)
    graph.keep(by_vq, f"{name}_vq")
    graph.keep(painted, f"{name}_painted")
    with own.added(*families):
        run = double.run(graph.prompt)
    assert run.status == "success", (run.node, run.error)
    for what in ("vq", "painted"):
        (image,) = double.saved(f"{name}_{what}").values()
        assert image.shape == (2, 16, 16, 3) and image.std() > 0.01


_TOYS = ((toy_vlm, "ToyVLM"), (toy_codec, "ToyCodecFamily"), (toy_backbone, "ToyBackboneFamily"))


def _of_pack(module, pack: str):
    """A toy's module, bound to the library as the pack loaded it."""
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.split(".")[0] == "dcdd_core"]:
            del sys.modules[name]
        prefix = f"{pack}."
        for name in [name for name in sys.modules if name.startswith(f"{prefix}dcdd_core")]:
            sys.modules[name.removeprefix(prefix)] = sys.modules[name]
        spec = importlib.util.spec_from_file_location(f"{module.__name__}_of_pack", module.__file__)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
