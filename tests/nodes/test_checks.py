"""Two models that share a name and have different codebooks are told apart in the nodes' messages."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from dcdd_core.models.bundle import read_card
from dcdd_core.types import Calibration
from dcdd_pico.embedded import WEIGHTS, own_calibration


class Book:
    """A codebook in so far as the checks read it."""

    def __init__(self, number: float, size: int = 1024):
        self.size = size
        self.fingerprint = f"{size}x8:{number:+.3f}" + ",+0.100" * 7


def logits(codebook: str | None, size: int = 1024):
    return SimpleNamespace(model="pico", codebook=codebook, logits=torch.zeros(1, 1, size))


@pytest.fixture
def checks(double):
    with double._modules.installed():
        yield sys.modules[f"{double.pack.__name__}.nodes.checks"]


def calibration_of(folder: str) -> Calibration:
    """Of an embedded VLM: of its own, or on the decoder's card."""
    own = own_calibration(vlm=folder)
    return read_card(WEIGHTS / "decoder.safetensors").calibration if own is None else Calibration.load(own)


OURS, OTHER = Book(0.5), Book(0.7)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("check_tokenizer", (logits(OTHER.fingerprint), SimpleNamespace(name="pico", codebook=OURS))),
        ("check_edit", (logits(OTHER.fingerprint), SimpleNamespace(name="pico", codebook=OURS), None)),
        (
            "check_decoder",
            (
                SimpleNamespace(codebook=OTHER.fingerprint, tokenizer="pico"),
                SimpleNamespace(name="pico", codebook=OURS),
            ),
        ),
        (
            "check_calibration",
            (SimpleNamespace(codebook=OTHER.fingerprint, vlm="pico"), SimpleNamespace(name="pico", codebook=OURS)),
        ),
        (
            "check_condition",
            (
                SimpleNamespace(codebook=OTHER.fingerprint, model="pico", code_vectors=torch.zeros(1, 1, 8)),
                SimpleNamespace(card=SimpleNamespace(codebook=OURS.fingerprint, code_dim=8, tokenizer="pico")),
            ),
        ),
    ],
)
def test_models_of_one_name_are_told_apart(checks, name, arguments):
    with pytest.raises(ValueError, match="another codebook") as told:
        getattr(checks, name)(*arguments)
    found = re.findall(r"pico( \(codebook [0-9a-f]{6}\))?", str(told.value))
    assert "" not in found and len(set(found)) == 2


@pytest.mark.parametrize("codebook", [None, OURS.fingerprint])
def test_sizes_tell_models_apart_whose_codebooks_do_not(checks, codebook):
    with pytest.raises(ValueError, match=r"from pico \(512 codes\), and vq_vae from pico \(1,024 codes\), which has"):
        checks.check_tokenizer(logits(codebook, 512), SimpleNamespace(name="pico", codebook=OURS))
    condition = SimpleNamespace(codebook=codebook, model="pico", code_vectors=torch.zeros(1, 1, 4))
    decoder = SimpleNamespace(card=SimpleNamespace(codebook=OURS.fingerprint, code_dim=8, tokenizer="pico"))
    with pytest.raises(ValueError, match=r"tokens of pico \(4 numbers a code\), .* for pico \(8 numbers a code\)"):
        checks.check_condition(condition, decoder)


def test_models_of_two_names_are_told_by_these_alone(checks):
    with pytest.raises(ValueError, match="come from pico, and vq_vae from other, which"):
        checks.check_tokenizer(logits(OTHER.fingerprint), SimpleNamespace(name="other", codebook=OURS))


def test_each_built_in_model_is_read_with_the_calibration_of_its_own(checks, double):
    """A loader names a model as its calibration does; only Janus' is on the decoder's card."""
    of = {name: sys.modules[f"{double.pack.__name__}.{name}"] for name in ("nodes.load", "dcdd_core.models.bundle")}
    load, found = of["nodes.load"], {}
    card = of["dcdd_core.models.bundle"].read_card(WEIGHTS / "decoder.safetensors")
    for model, folder in load.BUILT_IN.items():
        sampler = load.LoadJanus.execute(model=model, dtype="float32", placement="CPU").args[0].sampler.idle
        sampled = SimpleNamespace(
            source="vlm", calibrated=False, model=sampler.name, codebook=card.codebook, guidance=None, temperature=None
        )
        found[folder] = checks.served(card, sampled).calibration.scale
        assert sampler.default_guidance == calibration_of(folder).guidance, folder
    assert found == {folder: calibration_of(folder).scale for folder in found} and len(set(found.values())) == 3


@pytest.mark.parametrize("scale", [None, 0.36])
def test_a_vae_that_encodes_to_nan_is_refused_whatever_the_card_says(checks, scale):
    codec = SimpleNamespace(encode=lambda pixels: torch.full((1, 16, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="the connected VAE encodes an image to NaN or infinity"):
        checks.check_vae_scale(codec, SimpleNamespace(vae_scale=scale), has_own=True)


def test_a_card_without_a_scale_takes_latents_of_any_spread(checks):
    codec = SimpleNamespace(encode=lambda pixels: 50 * torch.randn(1, 16, 4, 4))
    checks.check_vae_scale(codec, SimpleNamespace(vae_scale=None), has_own=True)
    with pytest.raises(ValueError, match="is another model's: its latents have a spread of"):
        checks.check_vae_scale(codec, SimpleNamespace(vae_scale=0.36), has_own=True)
