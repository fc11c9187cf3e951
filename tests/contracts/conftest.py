"""The files of one small model of every family, by the family's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel

from dcdd_core import registry
from tests.contracts import toy_backbone, toy_codec, toy_vlm
from tests.models.masked.tiny_masked import save_tiny_masked
from tests.tiny import fill, save_janus, tiny_flux_config, tiny_vae
from tests.tiny_amused import save_tiny_amused
from tests.tiny_bigfix import save_bigfix
from tests.tiny_llamagen import save_llamagen

TOYS = (toy_vlm.ToyVLM(), toy_codec.ToyCodecFamily(), toy_backbone.ToyBackboneFamily())


def save_vae(folder: Path) -> Path:
    tiny_vae().save_pretrained(folder)
    return folder


def save_flux(folder: Path) -> Path:
    fill(FluxTransformer2DModel(**tiny_flux_config())).save_pretrained(folder)
    return folder


#: How a small model of each family is written; a family that is missing here fails every contract.
FILES = {
    "janus": save_janus,
    "llamagen": save_llamagen,
    "masked": save_tiny_masked,
    "amused": save_tiny_amused,
    "bigfix": save_bigfix,
    "kl": save_vae,
    "flux-fill": save_flux,
    "toy": toy_vlm.save,
    "toy codec": toy_codec.save,
    "toy backbone": toy_backbone.save,
}


@pytest.fixture(autouse=True)
def toys():
    """The toy families are known to the registry within each test."""
    with registry.added(*TOYS):
        yield


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files of a family by its name, written once."""
    written: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in written:
            written[name] = FILES[name](tmp_path_factory.mktemp("family") / name.replace(" ", "-"))
        return written[name]

    return of


def names(families) -> list[str]:
    """Of the registry's families and the toys, for parametrisation."""
    with registry.added(*TOYS):
        return [family.name for family in families()]
