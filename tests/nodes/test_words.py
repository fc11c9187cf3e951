"""Numbers that the nodes' words name, against the code and the weights that they are of."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks.guidance import TILE, gradient_cost, step_flops
from dcdd_core import registry
from dcdd_core.evaluation import stage_sheet
from dcdd_core.models.autoregressive.token_loop import window_for
from dcdd_core.models.backbones.flux_fill.files import FLUX_FILL_CONFIG
from dcdd_core.models.bundle import read_card
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.llamagen.sampler import SAMPLING
from dcdd_pico.embedded import LLAMAGEN, PROGRESSIVE, WEIGHTS
from tests.comfy.snapshot import SNAPSHOT, inputs
from tests.shipped import ROOT
from tests.tiny import tiny_janus

INFO = json.loads(SNAPSHOT.read_text("utf-8"))
CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
JANUS, MASKED = "DCDD_JanusLogitSampler", "DCDD_ProgressiveTokenSampler"
SAMPLERS = (JANUS, MASKED)
GUIDANCE, SHARPEN = "DCDD_DistributionGuidance", "DCDD_SharpenToTokens"
CPU = torch.device("cpu")


def pages(node: str) -> tuple[str, str]:
    """The help pages, English and Chinese."""
    docs = ROOT / "web" / "docs"
    return (docs / f"{node}.md").read_text("utf-8"), (docs / node / "zh.md").read_text("utf-8")


def tooltips(node: str, name: str) -> tuple[str, str]:
    return inputs(INFO[node])[name][1]["tooltip"], CHINESE[node]["inputs"][name]["tooltip"]


def numbers(texts: tuple[str, str], english: str, chinese: str) -> list[tuple[str, ...]]:
    """What the groups of the two patterns find, each of which has to be there once."""
    found = []
    for text, pattern in zip(texts, (english, chinese)):
        matches = re.findall(pattern, text)
        assert len(matches) == 1, f"{pattern!r} is there {len(matches)} times in: {text}"
        found.append(matches[0] if isinstance(matches[0], tuple) else (matches[0],))
    return found


def config_of(vlm: str) -> dict:
    return json.loads((WEIGHTS / vlm / "config.json").read_text("utf-8"))


@pytest.mark.parametrize("texts", [tooltips(MASKED, "passes"), pages(MASKED)], ids=["tooltips", "pages"])
def test_picos_passes(texts):
    own = str(config_of(PROGRESSIVE)["sampling"]["passes"])
    assert numbers(texts, r"pico progressive: (\d+)", r"pico (?:progressive|渐进) ?为 (\d+)") == [(own,)] * 2


def test_picos_passes_in_the_workflow():
    (path,) = (ROOT / "workflows").glob("10 *.json")
    own = config_of(PROGRESSIVE)["sampling"]["passes"]
    assert re.findall(r"0 is the model's own number, (\d+)", path.read_text("utf-8")) == [str(own)]


@pytest.mark.parametrize("node", SAMPLERS)
@pytest.mark.parametrize("read", [pages, lambda node: tooltips(node, "seed")], ids=["pages", "tooltips"])
def test_a_batch_is_its_singles_but_for_rounding(node, read):
    assert numbers(read(node), "but for (rounding): in half precision", "(舍入)差异：半精度下") == [
        ("rounding",),
        ("舍入",),
    ]


def test_picos_tokens():
    rows, columns = config_of(PROGRESSIVE)["network"]["grid"]
    assert re.findall(r"pico: (\d+)\)", tooltips(MASKED, "revise")[0]) == [str(rows * columns)]


def test_tokens_that_are_guessed_ahead():
    """With guidance, two rows an image; fewer in a batch, and none where they were not measured to be faster."""
    most = window_for(2, CPU, torch.float32)
    assert numbers(pages(JANUS), r"up to (\d+) tokens at a time", r"每次最多 (\d+) 个") == [(str(most),)] * 2
    assert window_for(1, CPU, torch.float32) == most > window_for(4, CPU, torch.float32)
    assert window_for(2, CPU, torch.bfloat16) == window_for(2, torch.device("cuda"), torch.float32) == 1


def test_passes_in_a_row_of_the_sheet():
    output = INFO[MASKED]["output_tooltips"][1], CHINESE[MASKED]["outputs"]["1"]["tooltip"]
    for texts in (output, pages(MASKED)):
        assert numbers(texts, r"(\d+) to a row", r"每行 (\d+) 遍") == [(str(stage_sheet._COLUMNS),)] * 2


@pytest.mark.parametrize("texts", [*(tooltips(node, "guidance") for node in SAMPLERS), pages(JANUS)])
def test_guidances_of_the_models(texts):
    janus = JanusSampler(*tiny_janus()).default_guidance
    pico = read_card(WEIGHTS / "decoder.safetensors").calibration.guidance
    assert pico == config_of(PROGRESSIVE)["sampling"]["guidance"]
    own = tuple(f"{number:g}" for number in (janus, SAMPLING.guidance, pico, config_of(LLAMAGEN)["guidance"]))
    english = r"own: ([\d.]+) for Janus-Pro, ([\d.]+) for LlamaGen, ([\d.]+) for pico, ([\d.]+) for pico llamagen"
    chinese = r"Janus-Pro 为 ([\d.]+)，LlamaGen 为 ([\d.]+)，pico 为 ([\d.]+)，pico (?:llamagen|LlamaGen) 为 ([\d.]+)"
    assert numbers(texts, english, chinese) == [own] * 2


@pytest.mark.parametrize("texts", [*(tooltips(node, "top_k") for node in SAMPLERS), pages(JANUS)])
def test_top_k_of_the_models(texts):
    own = [(str(SAMPLING.top_k),)] * 2
    english, chinese = r"own: (\d+) for the published LlamaGen", r"已发布的 LlamaGen 为 (\d+)，其他模型为全部"
    assert numbers(texts, english, chinese) == own


@pytest.mark.parametrize("node", [GUIDANCE, SHARPEN])
def test_advice_against_too_much_is_less_than_the_default(node):
    found = numbers(pages(node), r"[Ll]ower `strength` to ([\d.]+)", r"强度降到 ([\d.]+)")
    assert found[0] == found[1] and float(found[0][0]) < inputs(INFO[node])["strength"][1]["default"]
    if node == SHARPEN:
        found = numbers(pages(node), r"or `steps` to (\d+)", r"步数降到 (\d+)")
        assert found[0] == found[1] and int(found[0][0]) < inputs(INFO[node])["steps"][1]["default"]


@pytest.mark.slow
def test_a_gradient_beside_a_step_of_flux():
    """Counted at the published shapes; above 512 pixels in tiles."""
    codec, tokenizer = registry.codecs()[0].published(), registry.samplers()[0].published_tokenizer()
    codec.model.requires_grad_(False)
    shares = [
        gradient_cost(codec, tokenizer, side, tile=tile)[0] / step_flops(FLUX_FILL_CONFIG, side, factor=codec.factor)
        for side, tile in ((384, None), (512, None), (768, TILE), (1024, TILE))
    ]
    assert (
        numbers(
            pages(GUIDANCE),
            r"adds (\d+) % to a FLUX step at 384 pixels and (\d+) % at 512\..* adds (\d+) % at 768 and (\d+) % at 1024",
            r"384 像素时多用 (\d+) %，512 像素时 (\d+) %。.*768 像素时多用 (\d+) %，1024 像素时 (\d+) %",
        )
        == [tuple(f"{100 * share:.0f}" for share in shares)] * 2
    )
    steps = inputs(INFO[SHARPEN])["steps"][1]["default"]
    english = rf"{steps} steps at 384 pixels take as much as ([\d.]+) steps of FLUX"
    found = numbers(pages(SHARPEN), english, rf"{steps} 步的计算量相当于 FLUX 的 ([\d.]+) 步")
    assert found == [(f"{steps * shares[0]:.1f}",)] * 2 and steps * shares[0] < 2
