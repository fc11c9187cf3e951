"""What ComfyUI's own page makes of the pack's words, in English and Chinese: help pages and node search."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.shipped import ROOT

if TYPE_CHECKING:
    from tests.ui.page import ComfyPage

pytestmark = pytest.mark.ui

INFO = json.loads((ROOT / "tests" / "comfy" / "object_info.json").read_text("utf-8"))
#: What an artist may type, and the node that is meant. Words of search_aliases, which v0.8.0's page does not read.
SEARCHES = {
    "side by side": "DCDD_CompareDecoders",
    "contact sheet": "DCDD_CompareDecoders",
    "hugging face": "DCDD_DownloadModel",
    "no training": "DCDD_DistributionGuidance",
    "diffusion decoder": "DCDD_FluxDecoder",
    "autoregressive sampler": "DCDD_JanusLogitSampler",
    "text to image": "DCDD_JanusLogitSampler",
    "distributional mapping": "DCDD_LCDMEncoder",
    "import calibration": "DCDD_LoadCalibration",
    "bundle": "DCDD_LoadDecoder",
    "deepseek": "DCDD_LoadJanus",
    "prior": "DCDD_LoadPicoModel",
    "tokenizer": "DCDD_LoadVQVAE",
    "temperature scaling": "DCDD_LogitCalibrator",
    "entropy": "DCDD_LogitStatistics",
    "test image": "DCDD_PicoScene",
    "coarse to fine": "DCDD_ProgressiveTokenSampler",
    "masked sampler": "DCDD_ProgressiveTokenSampler",
    "export calibration": "DCDD_SaveCalibration",
    "no diffusion": "DCDD_SharpenToTokens",
    "over-cooked": "DCDD_TokenAgreement",
    "start latent": "DCDD_TokenGuideLatent",
    "heat map": "DCDD_UncertaintyMask",
    "detokenize": "DCDD_VQVAEDecode",
    "image to tokens": "DCDD_VQVAEEncode",
    "decode tokens": "DCDD_VQVAEDecode",
    "llamagen": "DCDD_LoadVQVAE",
    "自回归": "DCDD_JanusLogitSampler",
    "令牌": "DCDD_VQVAEEncode",
    "渐进": "DCDD_ProgressiveTokenSampler",
    "扩散解码": "DCDD_FluxDecoder",
}
LANGUAGES = ("en", "zh")
DOCS = ROOT / "web" / "docs"


def names(language: str) -> dict[str, str]:
    """What the nodes are called."""
    words = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    return {node: entry["display_name"] for node, entry in words.items()}


@pytest.fixture(scope="module", params=LANGUAGES)
def page_in(request: pytest.FixtureRequest, open_page: Callable[..., ComfyPage]) -> Iterator[tuple[str, ComfyPage]]:
    """A language, and a page in it."""
    page = open_page(request.param, {"Comfy.Locale": request.param, "Comfy.VueNodes.Enabled": False})
    yield request.param, page
    page.close()


@pytest.mark.parametrize("node", INFO)
def test_help_opens_with_its_image(page_in, node):
    language, page = page_in
    page.fill([node])
    text = (DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md").read_text("utf-8")
    title, first, *_ = filter(None, text.splitlines())
    shown = page.help_page(node, f"{node}.jpg")
    assert shown[: len(title) - 2] == title.removeprefix("# ")
    assert re.sub(r"[*`]", "", first) in shown
    assert page.errors() == []


@pytest.mark.parametrize("node", INFO)
def test_search_finds_a_node_by_its_name(page_in, node):
    language, page = page_in
    name = names(language)[node]
    page.search(name)
    assert page.found(name), page.results()


@pytest.mark.parametrize("typed, node", SEARCHES.items())
def test_search_finds_a_node_by_its_aliases(page_in, typed, node):
    language, page = page_in
    if page.name.startswith("1.35."):
        pytest.skip("this one knows no aliases")
    page.search(typed)
    assert page.found(names(language)[node]), page.results()


@pytest.mark.parametrize("name", [path.stem for path in ROOT.glob("subgraphs/*.json")])
def test_search_finds_the_blueprint(page_in, name):
    _, page = page_in
    page.search(name)
    assert page.found(name), page.results()


@pytest.mark.parametrize("language, shown", [("en", "uniform"), ("zh", "均匀")])
def test_options_are_shown_in_the_language(open_page, language, shown):
    """In Nodes 2.0, whose words can be read; the workflow keeps the English option."""
    page = open_page(f"options, {language}", {"Comfy.Locale": language, "Comfy.VueNodes.Enabled": True})
    if page.server.version.startswith("1.35."):
        page.close()
        pytest.skip("its first Nodes 2.0 shows options as they are; its canvas does not")
    page.fill(["DCDD_FluxDecoder"])
    assert page.choose_option("DCDD_FluxDecoder", "schedule", "uniform") == "uniform"
    assert shown in page.text_of("DCDD_FluxDecoder")
    assert page.errors() == []
    page.close()


def test_search_says_when_nothing_is_found(page_in):
    _, page = page_in
    page.search("no node is called that")
    assert not page.found(names("en")["DCDD_LoadJanus"]) and page.results() == []
