"""One server for all tests here, with the pack, the test-only pack, and models to choose from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfy.graphs import Graph
from tests.comfy.server import ComfyServer, copy_pack, locate


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The real ComfyUI; where there is none, the tests are skipped with the way to get it."""
    try:
        comfy, python = locate()
    except LookupError as missing:
        pytest.skip(str(missing))
    base = tmp_path_factory.mktemp("comfy")
    extra = prepare(base)
    with ComfyServer(comfy, python, base, ["--extra-model-paths-config", extra, "--preview-method", "auto"]) as running:
        yield running
        assert running.alive, running.log()[-4000:]


@pytest.fixture(scope="session")
def info(server: ComfyServer) -> dict:
    """/object_info of a fresh server."""
    return server.get("/object_info")


@pytest.fixture
def graph(info: dict) -> Graph:
    """An empty prompt to fill."""
    return Graph(info)


def prepare(base: Path) -> Path:
    """The packs and models that the tests speak of; returns the extra_model_paths.yaml.

    models/janus/another    pico with its codebook in another order
    models/janus/cut        the same with the beginning of its weights alone
    models/janus/amused, models/janus/bigfix    tiny ones in the layouts of published masked samplers
    models/janus/llamagen   a tiny t2i_tiny as LlamaGen's authors publish it: 4 x 4 tokens of 64 codes
    models/janus/masked     a masked sampler with random weights, of pico's tokens; its image tokenizer is pico's own
    elsewhere/models/tiny   another Janus altogether: 4 x 4 tokens of 64 codes; in a folder of extra_model_paths.yaml
    models/dcdd             pico's decoder as bundle.safetensors; cut.safetensors, half of it; damaged.safetensors, the
                            JSON in its header spoilt; uncalibrated.safetensors, without its calibration
    models/dcdd/calibrations    good.safetensors, and damaged in the same two ways; pico llamagen.safetensors, the
                            embedded model's own
    models/diffusers/pico/vae   pico's autoencoder
    models/dcdd/flux.safetensors, models/diffusers/flux/vae     a decoder of pico's tokens with random weights that
                            paints latents of FLUX's size and scale, and its autoencoder
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from dcdd_core.types import Calibration
    from dcdd_pico.embedded import LLAMAGEN, calibration_name
    from tests.tiny import random_pico, save_flux_like, save_janus
    from tests.tiny_amused import save_tiny_amused
    from tests.tiny_bigfix import save_bigfix
    from tests.tiny_llamagen import save_llamagen

    pack = copy_pack(base / "custom_nodes")
    weights = pack / "dcdd_pico" / "weights"
    if not (weights / "decoder.safetensors").is_file():
        random_pico(weights)
    tools = base / "custom_nodes" / "dcdd_test_tools"
    tools.mkdir()
    shutil.copy(Path(__file__).with_name("tools_pack.py"), tools / "__init__.py")
    shutil.copy(Path(__file__).with_name("tools_nodes.py"), tools)

    models = base / "models"
    another = models / "janus" / "another"
    shutil.copytree(weights / "janus", another)
    (stored,) = another.glob("*.safetensors")
    tensors = load_file(stored)
    (codes,) = (name for name in tensors if name.endswith("quantize.embedding.weight"))
    save_file(tensors | {codes: tensors[codes].flip(0)}, stored, metadata={"format": "pt"})
    config = json.loads((another / "config.json").read_text("utf-8"))
    (another / "config.json").write_text(json.dumps(config | {"dcdd_name": "another"}), "utf-8")
    cut = models / "janus" / "cut"
    shutil.copytree(another, cut)
    (cut / stored.name).write_bytes(stored.read_bytes()[:100_000])
    save_janus(base / "elsewhere" / "models" / "tiny")
    save_random_masked(models / "janus" / "masked", weights / "janus")
    save_tiny_amused(models / "janus" / "amused")
    save_bigfix(models / "janus" / "bigfix")
    save_llamagen(models / "janus" / "llamagen")

    bundle = (weights / "decoder.safetensors").read_bytes()
    calibrations = models / "dcdd" / "calibrations"
    calibrations.mkdir(parents=True)
    (models / "dcdd" / "bundle.safetensors").write_bytes(bundle)
    (models / "dcdd" / "cut.safetensors").write_bytes(bundle[: len(bundle) // 2])
    (models / "dcdd" / "damaged.safetensors").write_bytes(bundle.replace(rb'"{\"base', rb'"[\"base', 1))
    with safe_open(weights / "decoder.safetensors", "pt") as file:
        header = file.metadata()
    card = json.loads(header["card"])
    Calibration.from_dict(card["calibration"]).save(calibrations / "good.safetensors")
    header["card"] = json.dumps(card | {"calibration": None})
    save_file(load_file(weights / "decoder.safetensors"), models / "dcdd" / "uncalibrated.safetensors", header)
    shutil.copy(weights / calibration_name(LLAMAGEN), calibrations / "pico llamagen.safetensors")
    good = (calibrations / "good.safetensors").read_bytes()
    (calibrations / "cut.safetensors").write_bytes(good[: len(good) // 2])
    (calibrations / "damaged.safetensors").write_bytes(good.replace(rb'"{\"scale', rb'"[\"scale'))
    shutil.copytree(weights / "vae", models / "diffusers" / "pico" / "vae")
    save_flux_like(models / "dcdd" / "flux.safetensors", models / "diffusers" / "flux" / "vae", card)

    extra = base / "extra_model_paths.yaml"
    # JSON is YAML.
    extra.write_text(json.dumps({"tests": {"base_path": str(base / "elsewhere"), "janus": "models"}}), "utf-8")
    return extra


def save_random_masked(folder: Path, janus: Path) -> None:
    """A masked sampler of pico's tokens with random weights; its image tokenizer lies in pico's own folder."""
    from dcdd_core import registry
    from dcdd_core.method.progressive import ProgressiveOptions
    from dcdd_core.models.masked.files import save_masked
    from dcdd_core.models.masked.network import MaskedConfig, MaskedTransformer
    from dcdd_core.models.masked.words import Words
    from tests.tiny import fill

    template = "{prompt}"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(janus / name, folder)
    codebook = registry.sampler_family(janus).load_tokenizer(str(janus)).codebook
    sizes = MaskedConfig(
        grid=(12, 12),
        codes=codebook.size,
        code_dim=codebook.dim,
        words=len(Words.load(folder, template).tokenizer),
        width=32,
        layers=2,
        heads=2,
        hidden=64,
    )
    save_masked(
        folder,
        fill(MaskedTransformer(sizes), 9),
        codebook,
        name="masked",
        template=template,
        tokenizer=os.path.relpath(janus, folder).replace(os.sep, "/"),
        sampling=ProgressiveOptions(guidance=3.0, passes=6, revision_passes=2),
    )
