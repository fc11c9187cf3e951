"""What every node has to do, as data: a node, its inputs, and what must come of it or what the user must read.

The same cases run in the double (tests/nodes) and in the real ComfyUI (tests/comfy/test_cases.py). The node that a case
is about is called "it"; nodes that it needs are taken from `PARTS` by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from tests.comfy.graphs import Graph, Link, options
from tests.comfy.server import PACK, Run
from tests.comfy.snapshot import SNAPSHOT
from tests.comfy.workflows import opened, to_prompt
from tests.shipped import ROOT

Values = dict[str, Any]
Node = tuple[str, Values]
Arrays = dict[str, np.ndarray]

PICO, FACTOR, GRID = "pico (built in)", 8, 12
PICO_PROGRESSIVE, PICO_LLAMAGEN = "pico progressive (built in)", "pico llamagen (built in)"
SIDE, TOKENS = FACTOR * GRID, GRID * GRID


class Host(Protocol):
    """A ComfyServer or the double."""

    base: Path

    def run(self, prompt: Values) -> Run: ...
    def show_previews(self, method: str) -> None: ...
    def saved(self, name: str) -> Arrays: ...


def of(name: str, index: int = 0) -> Link:
    """A link to a node's output."""
    return name, index


IT = of("it")
STAR = "a large plain red star in the centre on a plain sky ground"

#: The nodes that cases build on, two images in each batch.
PARTS: dict[str, Node] = {
    "janus": ("DCDD_LoadJanus", {}),
    "masked": ("DCDD_LoadJanus", {"model": "masked"}),
    "pico in passes": ("DCDD_LoadJanus", {"model": PICO_PROGRESSIVE}),
    "pico llamagen": ("DCDD_LoadJanus", {"model": PICO_LLAMAGEN}),
    "llamagen": ("DCDD_LoadJanus", {"model": "llamagen"}),
    "vq": ("DCDD_LoadVQVAE", {}),
    "decoder": ("DCDD_LoadDecoder", {}),
    "bare": ("DCDD_LoadDecoder", {"bundle": "bundle.safetensors"}),
    "uncalibrated": ("DCDD_LoadDecoder", {"bundle": "uncalibrated.safetensors", "vae": "pico/"}),
    "scenes": ("DCDD_PicoScene", {"seed": 3, "batch_size": 2}),
    "noise": ("TEST_Picture", {"fill": "noise", "batch": 2}),
    "three": ("TEST_Picture", {"fill": "noise", "batch": 3}),
    "nan image": ("TEST_Picture", {"fill": "nan"}),
    "two channels": ("TEST_Picture", {"fill": "noise", "channels": 2}),
    "wide": ("TEST_Picture", {"fill": "noise", "height": 128}),
    "proxies": ("DCDD_VQVAEEncode", {"vq_vae": of("vq"), "image": of("scenes")}),
    "sampled": ("DCDD_JanusLogitSampler", {"janus": of("janus"), "seed": 11, "guidance": 3.0, "batch_size": 2}),
    "of llamagen": ("DCDD_JanusLogitSampler", {"janus": of("llamagen"), "prompt": "a red circle"}),
    "of pico llamagen": (
        "DCDD_JanusLogitSampler",
        {"janus": of("pico llamagen"), "prompt": STAR, "seed": 3, "batch_size": 2},
    ),
    "calibration": ("DCDD_LoadCalibration", {"file": "good.safetensors"}),
    "calibrated": (
        "DCDD_LogitCalibrator",
        {"token_logits": of("proxies"), "vq_vae": of("vq"), "calibration": of("calibration")},
    ),
    "condition": (
        "DCDD_LCDMEncoder",
        {"token_logits": of("proxies"), "vq_vae": of("vq"), "decoder": of("decoder")},
    ),
    "first condition": ("TEST_One", {"value": of("condition")}),
    "first proxies": ("TEST_One", {"value": of("proxies")}),
    "mask": ("TEST_Mask", {"top": 17, "left": 24, "bottom": 64, "right": 70, "value": 1.0}),
    "three masks": ("TEST_Mask", {"batch": 3, "bottom": 48, "right": 48, "value": 1.0}),
    "nan mask": ("TEST_Mask", {"bottom": 48, "right": 48, "value": "nan"}),
    "empty mask": ("TEST_Mask", {"value": 0.0}),
    "other vq": ("DCDD_LoadVQVAE", {"model": "another"}),
    "other proxies": ("DCDD_VQVAEEncode", {"vq_vae": of("other vq"), "image": of("scenes")}),
    "small scene": ("DCDD_PicoScene", {"size": 64}),
    "small proxies": ("DCDD_VQVAEEncode", {"vq_vae": of("vq"), "image": of("small scene")}),
    "small calibrated": (
        "DCDD_LogitCalibrator",
        {"token_logits": of("small proxies"), "vq_vae": of("vq"), "calibration": of("calibration")},
    ),
    "flux": ("DCDD_LoadDecoder", {"bundle": "flux.safetensors", "vae": "flux/"}),
    "flux condition": (
        "DCDD_LCDMEncoder",
        {"token_logits": of("proxies"), "vq_vae": of("vq"), "decoder": of("flux")},
    ),
    "flux vae": ("TEST_RandomVAE", {"factor": 8}),
    "uncalibrated condition": ("DCDD_LCDMEncoder", {"token_logits": of("proxies"), "vq_vae": of("vq")}),
    "coarse vae": ("TEST_RandomVAE", {"channels": 4, "factor": 8}),
    "film vae": ("TEST_RandomVAE", {"film": True}),
    "pico model": ("DCDD_LoadPicoModel", {}),
    "guide latent": (
        "DCDD_TokenGuideLatent",
        {"token_logits": of("sampled"), "vq_vae": of("vq"), "vae": of("pico model", 1)},
    ),
    "first sampled": ("TEST_One", {"value": of("sampled")}),
    "first guide latent": (
        "DCDD_TokenGuideLatent",
        {"token_logits": of("first sampled"), "vq_vae": of("vq"), "vae": of("pico model", 1)},
    ),
    "guided": (
        "DCDD_DistributionGuidance",
        {
            "model": of("pico model"),
            "vae": of("pico model", 1),
            "token_logits": of("sampled"),
            "vq_vae": of("vq"),
        },
    ),
}

#: The tokenizer of the tiny LlamaGen.
VQ_16 = of("llamagen", 1)
PROXIES = {"token_logits": of("proxies"), "vq_vae": of("vq")}
DRAW = {"janus": of("janus"), "guidance": 1.0}
REVEAL = {"janus": of("masked"), "guidance": 1.0}
PAINT = {"decoder": of("decoder"), "condition": of("condition"), "steps": 2}
FOLLOWED = {"token_logits": of("sampled"), "vq_vae": of("vq")}
GUIDED = {"model": of("pico model"), "vae": of("pico model", 1), **FOLLOWED}
SHARPENED = {"vae": of("pico model", 1), **FOLLOWED}
FLUX = {"decoder": of("flux"), "condition": of("flux condition"), "steps": 2}
DOUBT = {"condition": of("condition"), "threshold": 0.3, "token_size": FACTOR}


@dataclass(frozen=True)
class Found:
    """What became of a case."""

    run: Run
    arrays: dict[str, Arrays]
    base: Path

    def __getitem__(self, name: str) -> np.ndarray:
        """A value that is one array."""
        return self.arrays[name]["value"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A node that has to work.

    Attributes:
        keep: what is looked at; written to a file each.
        more: further nodes of this case.
        check: raises AssertionError for what is not right.
        reports: what the progress bar has to show, and `previews` how many images.
        previewing: ComfyUI's --preview-method.
        blocked: nodes that do not run, and what is said there.
        notice: what a line on the node says.
        loose: names of `keep` of which the double can know the shapes alone.
        there: a file in the base directory that is there meanwhile.
    """

    name: str
    node: str
    inputs: Values = field(default_factory=dict)
    keep: dict[str, Link] = field(default_factory=lambda: {"it": IT})
    more: dict[str, Node] = field(default_factory=dict)
    check: Callable[[Found], None]
    reports: list[tuple[int, int]] | None = None
    previews: int | None = None
    notice: str | None = None
    previewing: str = "auto"
    blocked: dict[str, str] = field(default_factory=dict)
    loose: tuple[str, ...] = ()
    there: str | None = None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Inputs that a node has to refuse.

    Attributes:
        says: patterns of what the user reads: what came, what was expected, and the way out.
        listed: whether newer servers refuse it themselves, as no value of the list.
        away: a file or folder in the base directory that is not there meanwhile.
    """

    name: str
    node: str
    inputs: Values = field(default_factory=dict)
    more: dict[str, Node] = field(default_factory=dict)
    says: tuple[str, ...]
    listed: bool = False
    away: str | None = None


@dataclass(frozen=True)
class Interruption:
    """A node that has to stop after its report of this number."""

    node: str
    inputs: Values
    armed: str  # the input by way of which the interrupt is armed
    report: int = 1


def built(info: Values, node: str, inputs: Values, more: dict[str, Node], wanted: Iterable[str] = ()) -> Graph:
    """The prompt of "it" with all that it needs, and with further nodes of `more` and `PARTS`."""
    graph, known = Graph(info), {**PARTS, **more, "it": (node, inputs)}

    def add(name: str) -> None:
        kind, values = known[name]
        for value in values.values():
            if isinstance(value, tuple) and value[0] not in graph.prompt:
                add(value[0])
        graph.add(name, kind, **values)

    for name in ("it", *more, *wanted):
        if name not in graph.prompt:
            add(name)
    return graph


def run_case(case: Case, host: Host, info: Values) -> Found:
    graph = built(info, case.node, case.inputs, case.more, wanted=[name for name, _ in case.keep.values()])
    for name, link in case.keep.items():
        graph.keep(link, name)
    file = None if case.there is None else host.base / case.there
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    host.show_previews(case.previewing)
    try:
        run = host.run(graph.prompt)
    finally:
        host.show_previews("auto")
        if file is not None:
            file.unlink()
    assert run.status == "success", f"node {run.node}: {run.error_type} {run.error}"
    return Found(run, {name: host.saved(name) for name in case.keep}, host.base)


def run_refusal(case: Refusal, host: Host, info: Values) -> Run:
    graph = built(info, case.node, case.inputs, case.more)
    graph.add("end", "TEST_Hold", value=IT)
    if case.away is None:
        return host.run(graph.prompt)
    there = host.base / case.away
    hidden = there.with_name(f"{there.name} away")
    there.rename(hidden)
    try:
        return host.run(graph.prompt)
    finally:
        hidden.rename(there)


def run_interruption(case: Interruption, host: Host, info: Values) -> Run:
    arm = {"value": case.inputs[case.armed], "node": "it", "report": case.report}
    inputs = case.inputs | {case.armed: of("arm")}
    graph = built(info, case.node, inputs, {"arm": ("TEST_Interrupt", arm)})
    graph.add("end", "TEST_Hold", value=IT)
    return host.run(graph.prompt)


def assert_reported(told: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    """Newer versions of ComfyUI leave out some that come soon after another, but none of a bar that is full.

    Reports that nothing is done yet do not count: there are some while a schedule is read for the first time.
    """
    told = list(dict.fromkeys(step for step in told if step[0] > 0))
    expected = list(dict.fromkeys(expected))
    full = [step for step in expected if step[0] == step[1]]
    assert bool(told) == bool(expected) and [step for step in told if step[0] == step[1]] == full, told
    assert told == [step for step in expected if step in set(told)], told


def notices(run: Run) -> list[str]:
    """What "it" says, but for the loading of a schedule, which is told on slow machines alone."""
    return [text for text in run.notices["it"] if "schedule" not in text]


#: What a sampler says after its work.
PASSES_TOLD = re.compile(r"\d+ (to \d+ )?tokens( for each of \d+ images)? in (1 pass|\d+ passes)")


def check(case: Case, found: Found) -> None:
    """All that is said of a case that ran."""
    case.check(found)
    run = found.run
    assert "it" in run.executed
    if case.reports is not None:
        assert_reported(run.progress["it"], case.reports)
    if case.previews is not None:
        assert run.previews["it"] == case.previews
    assert run.blocked.keys() == case.blocked.keys(), run.blocked
    for name, says in case.blocked.items():
        assert re.search(says, run.blocked[name]), run.blocked[name]
    told = notices(run)
    if case.notice:
        assert any(case.notice in text for text in told), told
    else:
        assert all(PASSES_TOLD.fullmatch(text) for text in told), told


# --- checks -----------------------------------------------------------------------------------------------------------


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(((image - other) ** 2).mean()))


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a, b)


def close(a: np.ndarray, b: np.ndarray) -> None:
    """Whole numbers the same, others but for rounding: how a product is summed depends on the batch and the threads."""
    if a.dtype.kind == "f":
        np.testing.assert_allclose(a, b, atol=1e-3)
    else:
        same(a, b)


def batch_is_its_singles(found: Found) -> None:
    """Each array of "it" is those of "first" and "second", one below the other, and these differ."""
    for name, whole in found.arrays["it"].items():
        parts = [found.arrays[one][name] for one in ("first", "second")]
        close(whole, np.concatenate(parts))
        assert np.abs(parts[0] - parts[1]).max() > 0.01, f"{name}: both are the same"


def batch_is_its_singles_in_fewer_passes(found: Found) -> None:
    batch_is_its_singles(found)
    told = list(dict.fromkeys(step for step in found.run.progress["it"] if step[0] > 0))
    assert {total for _, total in told} == {TOKENS} and told == sorted(told) and told[-1] == (TOKENS, TOKENS)
    assert passes_told(found) >= len(told) and passes_told(found) < TOKENS


def passes_told(found: Found) -> int:
    return int(re.search(r"in (\d+) passes$", found.run.notices["it"][-1])[1])


def parallel_tokens_change_nothing(found: Found) -> None:
    """But the number of passes."""
    assert passes_told(found) == TOKENS
    for name in ("chosen", "twenty"):
        for key, value in found.arrays["it"].items():
            close(value, found.arrays[name][key])


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def tokens_as_pixels(values: np.ndarray) -> np.ndarray:
    """[B, N] -> [B, H, W], a square for each token."""
    return np.kron(values.reshape(-1, GRID, GRID), np.ones((1, FACTOR, FACTOR)))


def scene_is_drawn(found: Found) -> None:
    assert found["it"].shape == (2, 64, 64, 3)
    same(found["it"][1:], found["second"])
    assert not np.array_equal(found["it"][:1], found["second"])
    lines = str(found["caption"]).splitlines()
    assert len(lines) == 2 and lines[1] == str(found["caption of second"])


def most_likely_tokens(found: Found) -> None:
    cold, one = found.arrays["it"], found.arrays["top 1"]
    same(cold["tokens"], cold["logits"].argmax(-1))
    same(cold["tokens"], one["tokens"])
    assert cold["logits"].shape == (1, TOKENS, 1024) and cold["logits"].dtype == np.float32


def prompt_and_guidance_matter(found: Found) -> None:
    """At the first position, which no seed has a part in."""
    other, plain, guided = (found.arrays[name]["logits"][0, 0] for name in ("it", "first", "guided"))
    assert np.abs(other - plain).mean() > 0.1 and np.abs(guided - plain).mean() > 0.1
    said = found.run.notices["it"][-1]
    assert "does not know zebra" in said and f"{TOKENS} tokens in" in said, "the last line replaces those before it"


def edit_keeps_the_rest(found: Found) -> None:
    """The mask's rows 17..64 touch tokens 2..7, its columns 24..70 tokens 3..8."""
    inside = np.zeros((GRID, GRID), bool)
    inside[2:8, 3:9] = True
    inside = inside.ravel()
    before, after = found.arrays["given"], found.arrays["it"]
    for name in ("tokens", "logits"):
        same(after[name][:, ~inside], before[name][:, ~inside])
    assert (after["tokens"] != before["tokens"])[:, inside].mean() > 0.25


def edit_says_how_much(found: Found) -> None:
    outside = found["mask"][:, ::FACTOR, ::FACTOR].reshape(2, TOKENS) == 0
    same(found.arrays["it"]["tokens"][outside], found.arrays["given"]["tokens"][outside])
    least, most = sorted((~outside).sum(1))
    assert least < most, "the masks are to differ, for the test to tell"
    assert found.run.notices["it"][-1].startswith(f"{least} to {most} tokens for each of 2 images in ")


def options_matter(found: Found) -> None:
    """Each way gives other tokens than all others, and the model's own, spelled out, the same."""
    for name, value in found.arrays["as it is"].items():
        same(value, found.arrays["it"][name])
    ways = {name: arrays["tokens"] for name, arrays in found.arrays.items() if name != "as it is"}
    for one, other in combinations(ways, 2):
        assert (ways[one] != ways[other]).mean() > 0.02, f"{one} is as {other}"


def start_keeps_what_it_reveals(found: Found) -> None:
    """8 of 9 passes without revision reveal given tokens: the rest are those of the last pass alone."""
    kept = found.arrays["it"]["tokens"] == found.arrays["given"]["tokens"]
    assert 0.6 < kept.mean() < 0.95, kept.mean()
    earlier = found.arrays["earlier"]["tokens"] == found.arrays["given"]["tokens"]
    assert earlier.mean() < kept.mean() - 0.1, (earlier.mean(), kept.mean())


def tiny_is_sampled(found: Found) -> None:
    """4 x 4 tokens, each in the sheet, whose last image is not of one colour."""
    assert found.arrays["it"]["tokens"].shape == (1, 16) and np.isfinite(found.arrays["it"]["logits"]).all()
    sheet = found["stages"][0]
    assert sheet.shape[1] == 12 + 4 * (160 + 12)
    assert sheet[66 : 66 + 160, -172:-12].std() > 0.01


def pico_is_sampled_in_passes(found: Found) -> None:
    """By the guidance that it has of its own, in as many columns as passes."""
    for name, value in found.arrays["it"].items():
        same(value, found.arrays["guided"][name])
    assert found.arrays["it"]["logits"].shape == (2, TOKENS, 1024)
    assert not np.array_equal(*found.arrays["it"]["tokens"])
    assert found["stages"].shape[0] == 2 and found["stages"].shape[2] == 12 + 4 * (160 + 12)
    assert found["decoded"].shape == found["painted"].shape == (2, SIDE, SIDE, 3)


def llamagen_is_sampled(found: Found) -> None:
    """4 x 4 tokens as its authors sample them: guidance 7.5, of the 1000 most likely codes, which are all 64."""
    for name in ("as published", "all codes"):
        for key, value in found.arrays["it"].items():
            close(value, found.arrays[name][key])
    assert found.arrays["it"]["tokens"].shape == (1, 16) and found.arrays["it"]["logits"].shape == (1, 16, 64)
    assert found["decoded"].shape == (1, 16, 16, 3) and found["decoded"].std() > 0.01


def pico_llamagen_is_sampled(found: Found) -> None:
    """Another model than Janus, of the same tokens, which depend on its prompt; guided as its folder says."""
    file = found.base / "custom_nodes" / PACK / "dcdd_pico" / "weights" / "llamagen" / "config.json"
    own = json.loads(file.read_text("utf-8"))["guidance"]
    plain, guided, other = (found.arrays[name]["logits"][0, 0] for name in ("it", "guided", "other"))
    null = found.arrays["without a prompt"]["logits"][0, 0]
    np.testing.assert_allclose(guided, null + own * (plain - null), atol=2e-3)
    assert np.abs(plain - other).mean() > 0.1 and np.abs(plain - found.arrays["janus"]["logits"][0, 0]).mean() > 0.1
    assert found.arrays["guided"]["logits"].shape == (2, TOKENS, 1024)
    assert not np.array_equal(*found.arrays["guided"]["tokens"])


def own_calibration_is_used(found: Found) -> None:
    for name, value in found.arrays["it"].items():
        np.testing.assert_allclose(value, found.arrays["by hand"][name], atol=1e-4)
    assert np.abs(found.arrays["it"]["code_vectors"] - found.arrays["as Janus"]["code_vectors"]).max() > 1e-3
    assert found["painted"].shape == (2, SIDE, SIDE, 3)


def passes_are_shown(found: Found) -> None:
    """4 of a batch of 5, one column a pass; new positions are green, and the last column is the image."""
    sheets = found["it"]
    assert sheets.shape[0] == 4 and sheets.shape[2] == 12 + 3 * (160 + 12)
    assert not np.array_equal(sheets[0], sheets[1])
    # Below the title and the names, each image is 160 pixels high.
    top, below = 66, 66 + 160 + 26 + 12
    plain, marked = (sheets[0][row : row + 160, 12:172] for row in (top, below))
    assert (marked - plain)[..., 1].mean() > (marked - plain)[..., [0, 2]].mean() + 0.02
    last = sheets[0][top : top + 160, 12 + 2 * 172 : 12 + 2 * 172 + 160]
    blocks = ((np.arange(160) + 0.5) * SIDE / 160).astype(int)
    np.testing.assert_allclose(last, found["decoded"][0][blocks][:, blocks], atol=0.01)


def empty_mask_keeps_tokens(found: Found) -> None:
    same(found.arrays["it"]["tokens"], found.arrays["given"]["tokens"])


def image_is_tokenized(found: Found) -> None:
    """Its tokens are the nearest codes, and decoded they are the image again, and not its mirror image."""
    np.testing.assert_allclose(found["resized"], found["given"], atol=1e-6)
    same(found.arrays["it"]["tokens"], found.arrays["it"]["logits"].argmax(-1))
    near, mirrored = psnr(found["decoded"], found["given"]), psnr(found["decoded"], found["given"][:, :, ::-1])
    assert near > 18 and near > mirrored + 3, (near, mirrored)


def image_is_cropped(found: Found) -> None:
    """50 x 131 pixels at a longest side of 96 are 36.6 x 96, and 40 x 96 whole tokens."""
    assert found["resized"].shape == (1, 40, 96, 3)
    assert found.arrays["it"]["tokens"].shape == (1, 5 * 12)


def calibrations_agree(found: Found) -> None:
    same(found.arrays["it"]["logits"], found.arrays["by file"]["logits"])
    assert not np.array_equal(found.arrays["it"]["logits"], found.arrays["given"]["logits"])


def fit_matches_the_reference(found: Found) -> None:
    def entropy(name: str) -> float:
        p = softmax(found.arrays[name]["logits"])
        return float(-(p * np.log(p + 1e-300)).sum(-1).mean())

    gap, before = abs(entropy("it") - entropy("reference")), abs(entropy("given") - entropy("reference"))
    assert gap < 0.3 * before, (gap, before)


def calibration_is_read_again(found: Found) -> None:
    path = Path(str(found["it"]))
    assert path.parent == found.base / "models" / "dcdd" / "calibrations" and path.is_file()
    path.unlink()
    assert path.name == "kept.safetensors"


def lcdm_is_that_of_the_paper(found: Found) -> None:
    """The mean code under the distribution, its confidence and its margin, computed anew in float64."""
    weights = load_file(
        found.base / "custom_nodes" / PACK / "dcdd_pico" / "weights" / "janus" / "int8_rows.safetensors"
    )
    (codes,) = (value.astype(np.float64) for key, value in weights.items() if key.endswith("quantize.embedding.weight"))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    p = softmax(found.arrays["given"]["logits"])
    top = np.sort(p, -1)[..., ::-1]
    np.testing.assert_allclose(found.arrays["it"]["code_vectors"], p @ codes, atol=1e-5)
    np.testing.assert_allclose(found.arrays["it"]["uncertainty"][..., 0], top[..., 0], atol=1e-5)
    np.testing.assert_allclose(found.arrays["it"]["uncertainty"][..., 1], top[..., 0] - top[..., 1], atol=1e-5)


def reading_matters(found: Found) -> None:
    assert not np.array_equal(found.arrays["it"]["code_vectors"], found.arrays["tokens alone"]["code_vectors"])


def doubt(found: Found, feature: int = 0) -> np.ndarray:
    return 1 - found.arrays["condition"]["uncertainty"][..., feature]


def white_where_unsure(found: Found) -> None:
    white = tokens_as_pixels(doubt(found) > 0.3)
    assert 0.02 < white.mean() < 0.98, "the images are to hold both, for the test to tell"
    same(found["it"], white.astype(np.float32))
    bright = found["heat map"].mean(-1)
    assert bright[white > 0].mean() > bright[white == 0].mean() + 0.1, "unsure is bright"


def grey_by_doubt(found: Found) -> None:
    unsure = doubt(found, feature=1)
    np.testing.assert_allclose(found["it"], tokens_as_pixels(np.where(unsure > 0.3, unsure, 0)), atol=1e-6)


def grown_by_a_token(found: Found) -> None:
    white = (doubt(found) > 0.3).reshape(-1, GRID, GRID)
    padded = np.pad(white, ((0, 0), (1, 1), (1, 1)))
    around = [padded[:, r : r + GRID, c : c + GRID] for r in range(3) for c in range(3)]
    same(found["it"], tokens_as_pixels(np.any(around, 0)).astype(np.float32))


def mask_lies_in_the_middle(found: Found) -> None:
    """Where the image is cropped for its tokens; the rest of it is black."""
    assert found["it"].shape == (2, 128, 96) and found["heat map"].shape == (2, 128, 96, 3)
    middle = slice(16, 112)
    same(found["it"][:, middle], found["square"])
    same(found["heat map"][:, middle], found["square heat map"])
    for name in ("it", "heat map"):
        assert not found[name][:, :16].any() and not found[name][:, 112:].any(), name


def blurred_mask(found: Found) -> None:
    assert ((found["it"] > 0.01) & (found["it"] < 0.99)).mean() > 0.05
    np.testing.assert_allclose(found["it"].mean(), (doubt(found) > 0.3).mean(), atol=0.03)


def decoded_is_the_scene(found: Found) -> None:
    batch_is_its_singles(found)
    assert psnr(found["it"], found["given"]) > 18


def softly_decoded_is_the_scene(found: Found) -> None:
    """The hard tokens are the same before and after calibration; the expected codes are not."""
    assert psnr(found["it"], found["given"]) > 15
    same(found["hard"], found["hard before"])
    assert not np.array_equal(found["it"], found["hard"])


def painted_is_the_scene(found: Found) -> None:
    near, mirrored = psnr(found["it"], found["given"]), psnr(found["it"], found["given"][:, :, ::-1])
    assert near > 18 and near > mirrored + 3, (near, mirrored)


def painted_batch_is_its_singles(found: Found) -> None:
    batch_is_its_singles(found)
    assert np.abs(found["second"] - found["second by another seed"]).max() > 0.01


def painted_under_the_mask(found: Found) -> None:
    """The rest to the last bit."""
    inside = np.zeros((SIDE, SIDE), bool)
    inside[17:64, 24:70] = True
    same(found["it"][:, ~inside], found["given"][:, ~inside])
    assert (found["it"] != found["given"])[:, inside].mean() > 0.9


def painted_as_flux_does(found: Found) -> None:
    """And the mask goes on with the latents, which are FLUX's: 16 channels at 1/8."""
    painted_under_the_mask(found)
    latent = found.arrays["latent"]
    assert latent["samples"].shape == (2, 16, 12, 12)
    inside = np.zeros((SIDE, SIDE), np.float32)
    inside[17:64, 24:70] = 1
    same(latent["noise_mask"], np.broadcast_to(inside, latent["noise_mask"].shape))


def whole_latent_has_no_mask(found: Found) -> None:
    assert found["it"].shape == (2, SIDE, SIDE, 3)
    assert found.arrays["latent"].keys() == {"samples"}


def part_is_resized(found: Found) -> None:
    """The middle of 96 x 128 pixels, in which the mask's rows 17..64 are 1..48; the rest is that of the image."""
    assert found["it"].shape == (2, SIDE, SIDE, 3)
    inside = np.zeros((SIDE, SIDE), bool)
    inside[1:48, 24:70] = True
    np.testing.assert_allclose(
        found["it"][:, ~inside], np.repeat(found["given"][:, 16:112][:, ~inside], 2, 0), atol=1e-6
    )
    assert (np.abs(found["it"] - found["given"][:, 16:112])[:, inside] > 1e-3).mean() > 0.9


def mask_is_put_on_the_image_first(found: Found) -> None:
    """A square mask's middle of 72 x 96 pixels becomes the image's 96 x 128: its rectangle 24..71 becomes 16..79."""
    given = np.repeat(found["given"][:, 16:112], 2, 0)
    outside = np.ones((SIDE, SIDE), bool)
    outside[13:83, 13:83] = False
    np.testing.assert_allclose(found["it"][:, outside], given[:, outside], atol=1e-6)
    edge = np.zeros((SIDE, SIDE), bool)
    edge[18:22, 18:78] = True
    assert (np.abs(found["it"] - given)[:, edge] > 1e-3).mean() > 0.9


def same_as_another(found: Found) -> None:
    for name, value in found.arrays["it"].items():
        same(value, found.arrays["other"][name])


def one_image_alone(found: Found) -> None:
    assert found["it"].shape[0] == 1 and np.median(found["it"][0, found["it"].shape[1] // 2]) == 1


def anything(found: Found) -> None:
    """What is said of it elsewhere is enough."""
    assert found.arrays["it"]


def tokens_of_its_own_size(found: Found) -> None:
    """200 x 300 pixels at a longest side of 96 are 64 x 96, antialiased: most of the noise's contrast is gone."""
    assert found["resized"].shape == (1, 64, 96, 3)
    channels = (Image.fromarray(np.ascontiguousarray(found["given"][0, :, :, k], np.float32)) for k in range(3))
    expected = np.stack([np.asarray(one.resize((96, 64), Image.Resampling.BICUBIC)) for one in channels], axis=-1)
    np.testing.assert_allclose(found["resized"][0], expected.clip(0, 1), atol=1e-5)
    assert found["resized"].std() < 0.5 * found["given"].std()


def nothing_painted(found: Found) -> None:
    same(found["it"], found["given"])


def schedules_differ(found: Found) -> None:
    images = [found[name] for name in ("it", "by resolution", "uniform")]
    assert all(not np.array_equal(a, b) for a, b in zip(images, images[1:] + images[:1]))


def stored_is_close(found: Found) -> None:
    exact = found["exact"]
    for name, share in (("it", 0.25), ("streamed", 0.25), ("half", 0.05), ("file", 0.0)):
        off = np.abs(found[name] - exact).mean()
        assert off <= share * exact.std(), (name, off)
    assert not np.array_equal(found["it"], exact), "8-bit is as if nothing was stored in it"


def half_is_close(found: Found) -> None:
    exact, half = found.arrays["exact"]["logits"], found.arrays["it"]["logits"]
    assert half.dtype == np.float32 and not np.array_equal(half[:, 0], exact[:, 0])
    # The first position alone: from the first token that differs on, the two say different things.
    assert np.abs(half[:, 0] - exact[:, 0]).mean() < 0.05 * np.abs(exact[:, 0]).mean()


def statistics_are_told(found: Found) -> None:
    table = str(found["table"])
    assert "one" in table and "two" in table and found["it"].shape[0] == 1
    assert found["it"].std() > 0.05


def black_left_of_white(found: Found) -> None:
    sheet = found["it"][0].mean(-1)
    left, right = np.split(sheet[sheet.shape[0] // 2], 2)
    assert np.median(left) == 0 and np.median(right) == 1


def other_than(found: Found, name: str) -> None:
    assert np.isfinite(found["it"]).all() and np.abs(found["it"] - found[name]).mean() > 1e-3


def decoder_is_guided(found: Found) -> None:
    same(found["off"], found["plain"])
    guided, plain = (float(found[name]) for name in ("agreement", "agreement of plain"))
    assert guided > plain + 0.03, (guided, plain)


def vae_is_picos(found: Found) -> None:
    """What comes back through it is the scene, and the sampler's steps paint one."""
    assert psnr(found["decoded"], found["given"]) > 22
    assert found["painted"].shape == (2, SIDE, SIDE, 3) and found["painted"].std() > 0.05


def guidance_is_followed(found: Found) -> None:
    """More tokens are read in the guided image, also under noise."""
    for name in ("agreement", "noisy"):
        guided, plain = (float(found[f"{name} of {each}"]) for each in ("it", "unguided"))
        assert guided > plain + 0.05, (name, guided, plain)


def guidance_is_off(found: Found) -> None:
    same(found["it"], found["unguided"])


def guidance_is_another(found: Found) -> None:
    other, usual = (found.arrays[name]["samples"] for name in ("it", "usual"))
    assert np.abs(other - usual).mean() > 2e-3 * np.abs(usual).mean()


def each_is_guided_under_its_own(found: Found) -> None:
    own, first = (found.arrays[name]["samples"] for name in ("it", "by the first"))
    close(own[0], first[0])
    assert np.abs(own[1] - first[1]).max() > 0.1


def followed_under_the_mask(found: Found) -> None:
    """The left half of the tokens is followed, the right half is not."""
    left, right = np.split(found["differs"], 2, axis=2)
    assert left.mean() < right.mean() - 0.1, (left.mean(), right.mean())


def latent_is_the_soft_image(found: Found) -> None:
    """Of 2 images of 96 pixels, at 1/4; its image is the soft decode."""
    assert found.arrays["it"]["samples"].shape == (2, 16, 24, 24)
    assert found["denoise"] == 0.6
    np.testing.assert_allclose(found["image"], found["soft"], atol=1e-5)
    assert psnr(found["decoded"], found["soft"]) > 20


def latent_is_the_tokens_image(found: Found) -> None:
    assert found["denoise"] == 0.3
    np.testing.assert_allclose(found["image"], found["hard"], atol=1e-5)


def latent_is_larger(found: Found) -> None:
    assert found.arrays["it"]["samples"].shape == (2, 16, 48, 32)
    assert found["image"].shape == (2, 192, 128, 3)


def sharpened_says_more(found: Found) -> None:
    after, before = float(found["agreement"]), float(found["agreement of soft"])
    assert after > before + 0.03, (after, before)
    assert found["it"].shape == (2, SIDE, SIDE, 3)
    np.testing.assert_allclose(found["it"], found["decoded"], atol=1e-5)


def agreement_is_counted(found: Found) -> None:
    """The same as the encoder's own tokens say, and the mask shows where."""
    differ = found.arrays["read"]["tokens"] != found.arrays["sampled"]["tokens"]
    np.testing.assert_allclose(found["it"], 1 - differ.mean(), atol=0.02)
    assert abs(found["differs"] - tokens_as_pixels(differ)).mean() < 0.02
    assert 0.2 < float(found["noisy"]) < float(found["it"]) < 0.99


def file_is_told(found: Found) -> None:
    assert Path(str(found["it"])) == found.base / "models" / "vae" / "ae.safetensors"


def sampler(model: Link, latent: str = "guide latent", steps: int = 6) -> Node:
    """Core's KSampler, as an artist connects it to a guide latent."""
    return "KSampler", {
        "model": model,
        "seed": 5,
        "steps": steps,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": of("pico model", 2),
        "negative": of("pico model", 2),
        "latent_image": of(latent),
        "denoise": of("guide latent", 1),
    }


def decoded(samples: str) -> Node:
    return "VAEDecode", {"samples": of(samples), "vae": of("pico model", 1)}


def read(image: Link) -> Node:
    return "DCDD_TokenAgreement", {"image": image, **FOLLOWED}


def scene(seed: int) -> Node:
    return "DCDD_PicoScene", {"seed": seed, "size": 64}


def one_of(name: str, index: int) -> Node:
    return "TEST_One", {"value": of(name), "index": index}


def painter(condition: str, seed: int, **values: Any) -> Node:
    return "DCDD_FluxDecoder", {**PAINT, "condition": of(condition), "seed": seed, **values}


HEART = "a large striped red heart in the centre on a wavy sky ground"  # the sampler's default
LINES = f"{HEART}\n\na small red ring on a plain ground"
COMBINED = {"image": of("noise"), "mask": of("mask")}
PROGRESSIVE = "DCDD_ProgressiveTokenSampler"
#: Of `masked`, whose own are 6 passes, 2 of them for revision, in Halton's order, and all are drawn again.
PASSES: dict[str, Values] = {
    "as it is": {"passes": 6, "revision_passes": 2, "order": "halton", "spread": 0, "revise": TOKENS},
    "more passes": {"passes": 9},
    "no revision pass": {"revision_passes": 0},
    "another order": {"order": "importance"},
    "kept apart": {"order": "raster", "spread": 3},
    "not apart": {"order": "raster"},
    "a few revised": {"revise": 5},
    "none revised": {"revise": 0},
}
STARTED = {**REVEAL, "token_logits": of("calibrated"), "passes": 9, "revision_passes": 0, "revise": 0}
ANCHORED = {"token_logits": of("of pico llamagen"), "vq_vae": of("vq"), "anchored": True}
AUTOENCODER = "autoencoder"
SCHEMAS = json.loads(SNAPSHOT.read_text("utf-8"))
DOWNLOADED = next(
    one for one in options(SCHEMAS["DCDD_DownloadModel"]["input"]["required"]["model"]) if AUTOENCODER in one
)


CASES = [
    Case(
        name="scenes",
        node="DCDD_PicoScene",
        inputs={"seed": 5, "size": 64, "batch_size": 2},
        more={"second": scene(6)},
        keep={
            "it": IT,
            "second": of("second"),
            "caption": of("it", 1),
            "caption of second": of("second", 1),
        },
        check=scene_is_drawn,
        reports=[(1, 2), (2, 2)],
    ),
    Case(
        name="sampled batch",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "seed": 7, "batch_size": 2},
        more={
            "first": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 7}),
            "second": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 8}),
        },
        keep={"it": IT, "first": of("first"), "second": of("second")},
        check=batch_is_its_singles_in_fewer_passes,
        previews=GRID,
        notice=f"{TOKENS} tokens for each of 2 images in ",
    ),
    Case(
        name="one token after the other",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "seed": 7, "parallel_tokens": 1},
        more={
            "chosen": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 7}),
            "twenty": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 7, "parallel_tokens": 20}),
        },
        keep={"it": IT, "chosen": of("chosen"), "twenty": of("twenty")},
        check=parallel_tokens_change_nothing,
        reports=[(k, TOKENS) for k in range(1, TOKENS + 1)],
        notice=f"{TOKENS} tokens in {TOKENS} passes",
    ),
    Case(
        name="a line an image",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "seed": 7, "prompt": LINES, "prompt_per_line": True},
        more={
            "first": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 7, "prompt": LINES.splitlines()[0]}),
            "second": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 8, "prompt": LINES.splitlines()[2]}),
        },
        keep={"it": IT, "first": of("first"), "second": of("second")},
        check=batch_is_its_singles,
    ),
    Case(
        name="temperature 0",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "temperature": 0.0},
        more={"top 1": ("DCDD_JanusLogitSampler", {**DRAW, "top_k": 1})},
        keep={"it": IT, "top 1": of("top 1")},
        check=most_likely_tokens,
    ),
    Case(
        name="guidance and unknown words",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "prompt": "a red zebra"},
        more={"first": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 7})},
        keep={"it": IT, "first": of("first"), "guided": of("sampled")},
        check=prompt_and_guidance_matter,
        notice="does not know zebra",
    ),
    Case(
        name="guidance of the model",
        node="DCDD_JanusLogitSampler",
        inputs={"janus": of("janus"), "seed": 11, "batch_size": 2},
        keep={"it": IT, "other": of("sampled")},
        check=same_as_another,
    ),
    Case(
        name="edit",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "token_logits": of("calibrated"), "mask": of("mask"), "seed": 77},
        keep={"it": IT, "given": of("calibrated")},
        check=edit_keeps_the_rest,
        notice="36 tokens for each of 2 images in ",
    ),
    Case(
        name="edit of more in one image than in another",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "token_logits": of("calibrated"), "mask": of("doubtful"), "seed": 77},
        more={"doubtful": ("DCDD_UncertaintyMask", DOUBT)},
        keep={"it": IT, "given": of("calibrated"), "mask": of("doubtful")},
        check=edit_says_how_much,
        notice=" tokens for each of 2 images in ",
    ),
    Case(
        name="edit of nothing",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "token_logits": of("calibrated"), "mask": of("empty mask")},
        keep={"it": IT, "given": of("calibrated")},
        check=empty_mask_keeps_tokens,
        notice="mask is empty",
    ),
    Case(
        name="Janus in bfloat16",
        node="DCDD_JanusLogitSampler",
        inputs={**DRAW, "janus": of("half"), "seed": 7},
        more={
            "half": ("DCDD_LoadJanus", {"dtype": "bfloat16", "placement": "CPU"}),
            "exact": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 7}),
        },
        keep={"it": IT, "exact": of("exact")},
        check=half_is_close,
        loose=("it",),
    ),
    Case(
        name="masked sampler token by token",
        node="DCDD_JanusLogitSampler",
        inputs={"janus": of("masked"), "seed": 7},
        more={"other": (PROGRESSIVE, {"janus": of("masked"), "seed": 7})},
        keep={"it": IT, "other": of("other")},
        check=same_as_another,
        reports=[(k, 6) for k in range(1, 7)],
        previews=6,
    ),
    Case(
        name="revealed batch",
        node=PROGRESSIVE,
        inputs={**REVEAL, "seed": 7, "batch_size": 2},
        more={
            "first": (PROGRESSIVE, {**REVEAL, "seed": 7}),
            "second": (PROGRESSIVE, {**REVEAL, "seed": 8}),
        },
        keep={"it": IT, "first": of("first"), "second": of("second")},
        check=batch_is_its_singles,
        reports=[(k, 6) for k in range(1, 7)],
        previews=6,
    ),
    Case(
        name="options of passes",
        node=PROGRESSIVE,
        inputs={"janus": of("masked"), "seed": 7},
        more={name: (PROGRESSIVE, {"janus": of("masked"), "seed": 7, **values}) for name, values in PASSES.items()},
        keep={"it": IT, **{name: of(name) for name in PASSES}},
        check=options_matter,
    ),
    Case(
        name="tokens drawn again under a mask",
        node=PROGRESSIVE,
        inputs={**REVEAL, "token_logits": of("calibrated"), "mask": of("mask"), "seed": 77},
        keep={"it": IT, "given": of("calibrated")},
        check=edit_keeps_the_rest,
        reports=[(k, 6) for k in range(1, 7)],
    ),
    Case(
        name="tokens drawn again under nothing",
        node=PROGRESSIVE,
        inputs={**REVEAL, "token_logits": of("calibrated"), "mask": of("empty mask")},
        more={"end": ("TEST_Hold", {"value": of("it", 1)})},
        keep={"it": IT, "given": of("calibrated")},
        check=empty_mask_keeps_tokens,
        notice="mask is empty",
        reports=[],
    ),
    Case(
        name="tokens to start from",
        node=PROGRESSIVE,
        inputs={**STARTED, "start": 8},
        more={"earlier": (PROGRESSIVE, {**STARTED, "start": 4})},
        keep={"it": IT, "earlier": of("earlier"), "given": of("calibrated")},
        check=start_keeps_what_it_reveals,
    ),
    Case(
        name="tokens to start from under a mask",
        node=PROGRESSIVE,
        inputs={**STARTED, "start": 2, "mask": of("mask")},
        keep={"it": IT, "given": of("calibrated")},
        check=edit_keeps_the_rest,
    ),
    Case(
        name="sheets of the passes",
        node=PROGRESSIVE,
        inputs={**REVEAL, "passes": 3, "batch_size": 5},
        more={"image": ("DCDD_VQVAEDecode", {"token_logits": IT, "vq_vae": of("masked", 1)})},
        keep={"it": of("it", 1), "decoded": of("image")},
        check=passes_are_shown,
        previews=3,
    ),
    *(
        Case(
            name=f"passes of {model}",
            node=PROGRESSIVE,
            inputs={"janus": of("loaded"), "prompt": "a red circle", "passes": 4},
            more={"loaded": ("DCDD_LoadJanus", {"model": model})},
            keep={"it": IT, "stages": of("it", 1)},
            check=tiny_is_sampled,
            reports=[(k, 4) for k in range(1, 5)],
            previews=4,
        )
        for model in ("amused", "bigfix")
    ),
    Case(
        name="pico in passes",
        node=PROGRESSIVE,
        inputs={"janus": of("pico in passes"), "seed": 3, "passes": 4, "batch_size": 2},
        more={
            "guided": (
                PROGRESSIVE,
                {"janus": of("pico in passes"), "seed": 3, "passes": 4, "batch_size": 2, "guidance": 3.0},
            ),
            "image": ("DCDD_VQVAEDecode", {"token_logits": IT, "vq_vae": of("pico in passes", 1)}),
            "mapped": ("DCDD_LCDMEncoder", {"token_logits": IT, "vq_vae": of("vq"), "decoder": of("decoder")}),
            "paint": painter("mapped", 1),
        },
        keep={
            "it": IT,
            "guided": of("guided"),
            "stages": of("it", 1),
            "decoded": of("image"),
            "painted": of("paint"),
        },
        check=pico_is_sampled_in_passes,
        reports=[(k, 4) for k in range(1, 5)],
        previews=4,
        notice=f"{TOKENS} tokens for each of 2 images in 4 passes",
    ),
    Case(
        name="LlamaGen as it is published",
        node="DCDD_JanusLogitSampler",
        inputs={"janus": of("llamagen"), "prompt": "a red circle", "seed": 4},
        more={
            "as published": (
                "DCDD_JanusLogitSampler",
                {"janus": of("llamagen"), "prompt": " A red (circle)", "seed": 4, "guidance": 7.5, "top_k": 1000},
            ),
            "all codes": (
                "DCDD_JanusLogitSampler",
                {"janus": of("llamagen"), "prompt": "a red circle", "seed": 4, "top_k": 0, "parallel_tokens": 1},
            ),
            "image": ("DCDD_VQVAEDecode", {"token_logits": IT, "vq_vae": of("llamagen", 1)}),
        },
        keep={
            "it": IT,
            "as published": of("as published"),
            "all codes": of("all codes"),
            "decoded": of("image"),
        },
        check=llamagen_is_sampled,
        previews=4,
        notice="16 tokens in ",
    ),
    Case(
        name="pico LlamaGen",
        node="DCDD_JanusLogitSampler",
        inputs={"janus": of("pico llamagen"), "prompt": STAR, "seed": 3, "guidance": 1.0},
        more={
            "without a prompt": (
                "DCDD_JanusLogitSampler",
                {"janus": of("pico llamagen"), "prompt": STAR, "seed": 3, "guidance": 0.0},
            ),
            "other": (
                "DCDD_JanusLogitSampler",
                {"janus": of("pico llamagen"), "prompt": HEART, "seed": 3, "guidance": 1.0},
            ),
            "by janus": ("DCDD_JanusLogitSampler", {**DRAW, "prompt": STAR, "seed": 3}),
        },
        keep={
            "it": IT,
            "guided": of("of pico llamagen"),
            "without a prompt": of("without a prompt"),
            "other": of("other"),
            "janus": of("by janus"),
        },
        check=pico_llamagen_is_sampled,
        previews=GRID,
        notice=f"{TOKENS} tokens in ",
    ),
    Case(
        name="pico LlamaGen's words",
        node="DCDD_JanusLogitSampler",
        inputs={"janus": of("pico llamagen"), "prompt": "a red zebra", "guidance": 1.0},
        check=anything,
        notice="does not know zebra",
    ),
    Case(
        name="pico LlamaGen's edit of an image",
        node="DCDD_JanusLogitSampler",
        inputs={
            "janus": of("pico llamagen"),
            "token_logits": of("calibrated"),
            "mask": of("mask"),
            "seed": 77,
        },
        keep={"it": IT, "given": of("calibrated")},
        check=edit_keeps_the_rest,
        notice="36 tokens for each of 2 images in ",
    ),
    Case(
        name="condition of pico LlamaGen",
        node="DCDD_LCDMEncoder",
        inputs={"token_logits": of("of pico llamagen"), "vq_vae": of("vq"), "decoder": of("decoder")},
        more={
            "paint": painter("it", 1),
            "its own": ("DCDD_LoadCalibration", {"file": "pico llamagen.safetensors"}),
            "pulled": ("DCDD_LogitCalibrator", {**ANCHORED, "calibration": of("its own")}),
            "by hand": ("DCDD_LCDMEncoder", {"token_logits": of("pulled"), "vq_vae": of("vq")}),
            "pulled as Janus": ("DCDD_LogitCalibrator", {**ANCHORED, "decoder": of("decoder")}),
            "as Janus": ("DCDD_LCDMEncoder", {"token_logits": of("pulled as Janus"), "vq_vae": of("vq")}),
        },
        keep={"it": IT, "by hand": of("by hand"), "as Janus": of("as Janus"), "painted": of("paint")},
        check=own_calibration_is_used,
    ),
    Case(
        name="unknown words of a masked sampler",
        node=PROGRESSIVE,
        inputs={**REVEAL, "prompt": "a red zebra"},
        check=anything,
        notice="masked does not know zebra",
    ),
    Case(
        name="tokens of scenes",
        node="DCDD_VQVAEEncode",
        inputs={"vq_vae": of("vq"), "image": of("scenes")},
        more={"decoded": ("DCDD_VQVAEDecode", {"token_logits": IT, "vq_vae": of("vq")})},
        keep={"it": IT, "resized": of("it", 1), "given": of("scenes"), "decoded": of("decoded")},
        check=image_is_tokenized,
        reports=[(1, 2), (2, 2)],
        previews=2,
    ),
    Case(
        name="tokens of an odd image",
        node="DCDD_VQVAEEncode",
        inputs={"vq_vae": of("vq"), "image": of("odd"), "longest_side": 96},
        more={"odd": ("TEST_Picture", {"fill": "noise", "height": 50, "width": 131, "channels": 4})},
        keep={"it": IT, "resized": of("it", 1)},
        check=image_is_cropped,
    ),
    Case(
        name="tokens of a large image",
        node="DCDD_VQVAEEncode",
        inputs={"vq_vae": of("vq"), "image": of("large")},
        more={"large": ("TEST_Picture", {"fill": "noise", "height": 200, "width": 300})},
        keep={"it": IT, "resized": of("it", 1), "given": of("large")},
        check=tokens_of_its_own_size,
    ),
    Case(
        name="calibrated by a decoder",
        node="DCDD_LogitCalibrator",
        inputs={**PROXIES, "decoder": of("decoder")},
        more={"by file": PARTS["calibrated"]},
        keep={"it": IT, "by file": of("by file"), "given": of("proxies")},
        check=calibrations_agree,
    ),
    Case(
        name="fitted calibration",
        node="DCDD_LogitCalibrator",
        inputs={**PROXIES, "reference": of("sampled"), "anchored": True},
        keep={"it": IT, "given": of("proxies"), "reference": of("sampled")},
        check=fit_matches_the_reference,
        notice="mean entropy",
    ),
    Case(
        name="saved calibration",
        node="DCDD_SaveCalibration",
        inputs={"calibration": of("calibration"), "name": "kept"},
        check=calibration_is_read_again,
        notice="saved kept.safetensors: scale",
        loose=("it",),
    ),
    Case(
        name="mapped without a decoder",
        node="DCDD_LCDMEncoder",
        inputs={"token_logits": of("sampled"), "vq_vae": of("vq")},
        keep={"it": IT, "given": of("sampled")},
        check=lcdm_is_that_of_the_paper,
        reports=[(1, 2), (2, 2)],
    ),
    Case(
        name="mapped batch",
        node="DCDD_LCDMEncoder",
        inputs={**PROXIES, "decoder": of("decoder")},
        more={
            name: ("DCDD_LCDMEncoder", {**PROXIES, "token_logits": of(f"{name} one"), "decoder": of("decoder")})
            for name in ("first", "second")
        }
        | {"first one": one_of("proxies", 0), "second one": one_of("proxies", 1)},
        keep={"it": IT, "first": of("first"), "second": of("second")},
        check=batch_is_its_singles,
        reports=[(1, 2), (2, 2)],
    ),
    Case(
        name="mapped from the tokens alone",
        node="DCDD_LCDMEncoder",
        inputs={"token_logits": of("sampled"), "vq_vae": of("vq"), "decoder": of("decoder")},
        more={
            "tokens alone": (
                "DCDD_LCDMEncoder",
                {
                    "token_logits": of("sampled"),
                    "vq_vae": of("vq"),
                    "decoder": of("decoder"),
                    "reads": "sampled tokens alone",
                },
            )
        },
        keep={"it": IT, "tokens alone": of("tokens alone")},
        check=reading_matters,
    ),
    Case(
        name="mapped from another guidance",
        node="DCDD_LCDMEncoder",
        inputs={"token_logits": of("unguided"), "vq_vae": of("vq"), "decoder": of("decoder")},
        more={"unguided": ("DCDD_JanusLogitSampler", {**DRAW, "seed": 7})},
        check=anything,
        notice="set guidance to 3 in the node that samples",
    ),
    Case(
        name="mask of doubt",
        node="DCDD_UncertaintyMask",
        inputs=DOUBT,
        keep={"it": IT, "heat map": of("it", 1), "condition": of("condition")},
        check=white_where_unsure,
    ),
    Case(
        name="mask of the condition's token size",
        node="DCDD_UncertaintyMask",
        inputs={"condition": of("condition"), "threshold": 0.3},
        keep={"it": IT, "heat map": of("it", 1), "condition": of("condition")},
        check=white_where_unsure,
    ),
    Case(
        name="soft mask of a narrow choice",
        node="DCDD_UncertaintyMask",
        inputs={**DOUBT, "feature": "narrow choice: 1 - margin", "edge": "soft"},
        keep={"it": IT, "condition": of("condition")},
        check=grey_by_doubt,
    ),
    Case(
        name="grown mask",
        node="DCDD_UncertaintyMask",
        inputs={**DOUBT, "grow": 1},
        keep={"it": IT, "condition": of("condition")},
        check=grown_by_a_token,
    ),
    Case(
        name="mask of an image's size",
        node="DCDD_UncertaintyMask",
        inputs={**DOUBT, "image": of("wide")},
        more={"alone": ("DCDD_UncertaintyMask", DOUBT)},
        keep={"it": IT, "heat map": of("it", 1), "square": of("alone"), "square heat map": of("alone", 1)},
        check=mask_lies_in_the_middle,
    ),
    Case(
        name="blurred mask",
        node="DCDD_UncertaintyMask",
        inputs={**DOUBT, "blur": 0.5},
        keep={"it": IT, "condition": of("condition")},
        check=blurred_mask,
    ),
    Case(
        name="decoded batch",
        node="DCDD_VQVAEDecode",
        inputs=PROXIES,
        more={
            name: ("DCDD_VQVAEDecode", {**PROXIES, "token_logits": of(f"{name} one")}) for name in ("first", "second")
        }
        | {"first one": one_of("proxies", 0), "second one": one_of("proxies", 1)},
        keep={"it": IT, "first": of("first"), "second": of("second"), "given": of("scenes")},
        check=decoded_is_the_scene,
        reports=[(1, 2), (2, 2)],
        previews=2,
    ),
    Case(
        name="decoded softly",
        node="DCDD_VQVAEDecode",
        inputs={"token_logits": of("calibrated"), "vq_vae": of("vq"), "codes": "soft: the expected codes"},
        more={
            "hard": ("DCDD_VQVAEDecode", {"token_logits": of("calibrated"), "vq_vae": of("vq")}),
            "hard before": ("DCDD_VQVAEDecode", PROXIES),
        },
        keep={"it": IT, "hard": of("hard"), "hard before": of("hard before"), "given": of("scenes")},
        check=softly_decoded_is_the_scene,
    ),
    Case(
        name="painted scenes",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "steps": 3},
        keep={"it": IT, "given": of("scenes")},
        check=painted_is_the_scene,
        reports=[(1, 3), (2, 3), (3, 3)],
        previews=3,
    ),
    Case(
        name="painted batch",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "seed": 40},
        more={
            "first one": one_of("condition", 0),
            "second one": one_of("condition", 1),
            "first": painter("first one", 40),
            "second": painter("second one", 41),
            "second by another seed": painter("second one", 42),
        },
        keep={
            "it": IT,
            "first": of("first"),
            "second": of("second"),
            "second by another seed": of("second by another seed"),
        },
        check=painted_batch_is_its_singles,
    ),
    Case(
        name="painted under a mask",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, **COMBINED},
        keep={"it": IT, "given": of("noise")},
        check=painted_under_the_mask,
        previews=2,
    ),
    Case(
        name="painted under a mask with ComfyUI's VAE",
        node="DCDD_FluxDecoder",
        inputs={**FLUX, **COMBINED, "vae": of("flux vae")},
        keep={"it": IT, "latent": of("it", 1), "given": of("noise")},
        check=painted_as_flux_does,
        previews=2,
        loose=("it", "latent"),
    ),
    Case(
        name="painted as FLUX does",
        node="DCDD_FluxDecoder",
        inputs={**FLUX, **COMBINED},
        keep={"it": IT, "latent": of("it", 1), "given": of("noise")},
        check=painted_as_flux_does,
        previews=2,
    ),
    Case(
        name="latent of a whole image",
        node="DCDD_FluxDecoder",
        inputs=FLUX,
        keep={"it": IT, "latent": of("it", 1)},
        check=whole_latent_has_no_mask,
    ),
    Case(
        name="latent of pico is none",
        node="DCDD_FluxDecoder",
        inputs=PAINT,
        more={"end": ("TEST_Hold", {"value": of("it", 1)})},
        check=anything,
        blocked={"end": "latents are not FLUX's .*connect the image"},
    ),
    Case(
        name="painted part of an image of another size",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "image": of("wide"), "mask": of("mask of wide")},
        more={"mask of wide": ("TEST_Mask", {**PARTS["mask"][1], "height": 128})},
        keep={"it": IT, "given": of("wide")},
        check=part_is_resized,
    ),
    Case(
        name="painted part of an image by a mask of another shape",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "image": of("wide"), "mask": of("square mask")},
        more={"square mask": ("TEST_Mask", {"top": 24, "left": 24, "bottom": 72, "right": 72, "value": 1.0})},
        keep={"it": IT, "given": of("wide")},
        check=mask_is_put_on_the_image_first,
    ),
    Case(
        name="condition for another decoder",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "condition": of("uncalibrated for")},
        more={
            "uncalibrated for": (
                "DCDD_LCDMEncoder",
                {"token_logits": of("proxies"), "vq_vae": of("vq"), "decoder": of("uncalibrated")},
            )
        },
        check=anything,
        notice="connect the same decoder to both",
    ),
    Case(
        name="condition of sampled tokens without a decoder",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "condition": of("plain")},
        more={"plain": ("DCDD_LCDMEncoder", {"token_logits": of("sampled"), "vq_vae": of("vq")})},
        check=anything,
        notice="connect the decoder to it too",
    ),
    *(
        Case(
            name=f"{node} without previews",
            node=node,
            inputs=inputs,
            check=anything,
            previews=0,
            previewing="none",
            loose=("it",) if "vae" in inputs else (),
        )
        for node, inputs in (
            ("DCDD_JanusLogitSampler", DRAW),
            ("DCDD_ProgressiveTokenSampler", REVEAL),
            ("DCDD_VQVAEEncode", {"vq_vae": of("vq"), "image": of("scenes")}),
            ("DCDD_VQVAEDecode", PROXIES),
            ("DCDD_FluxDecoder", PAINT),
            ("DCDD_FluxDecoder", {**FLUX, "vae": of("flux vae")}),
        )
    ),
    *(
        Case(
            name=f"previews by {method}",
            node="DCDD_FluxDecoder",
            inputs={**FLUX, "vae": of("flux vae")},
            check=anything,
            previews=2,
            previewing=method,
            loose=("it",),
        )
        for method in ("latent2rgb", "taesd")
    ),
    Case(
        name="painted under nothing",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "steps": 1, "image": of("noise"), "mask": of("empty mask")},
        keep={"it": IT, "given": of("noise")},
        check=nothing_painted,
        notice="mask is empty",
    ),
    Case(
        name="painted with guidance",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "steps": 4, "vq_vae": of("vq"), "strength": 0.015},
        more={
            "plain": painter("condition", 0, steps=4),
            "off": painter("condition", 0, steps=4, vq_vae=of("vq"), strength=0.0),
            "read": ("DCDD_TokenAgreement", {**PROXIES, "image": IT}),
            "read plain": ("DCDD_TokenAgreement", {**PROXIES, "image": of("plain")}),
        },
        keep={
            "it": IT,
            "plain": of("plain"),
            "off": of("off"),
            "agreement": of("read"),
            "agreement of plain": of("read plain"),
        },
        check=decoder_is_guided,
        reports=[(k, 4) for k in range(1, 5)],
        loose=("it", "agreement", "agreement of plain"),
    ),
    Case(
        name="painted under a mask with guidance, by ComfyUI's VAE",
        node="DCDD_FluxDecoder",
        inputs={**FLUX, **COMBINED, "vae": of("flux vae"), "vq_vae": of("vq"), "strength": 0.2},
        more={"plain": ("DCDD_FluxDecoder", {**FLUX, **COMBINED, "vae": of("flux vae")})},
        keep={"it": IT, "latent": of("it", 1), "given": of("noise"), "plain": of("plain")},
        check=lambda found: (painted_as_flux_does(found), other_than(found, "plain")),
        loose=("it", "latent", "plain"),
    ),
    Case(
        name="painted with guidance, mapped without a decoder",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "condition": of("mapped"), "vq_vae": of("vq"), "strength": 0.2},
        more={
            "mapped": ("DCDD_LCDMEncoder", {"token_logits": of("calibrated"), "vq_vae": of("vq")}),
            "plain": painter("mapped", 0),
        },
        keep={"it": IT, "plain": of("plain")},
        check=lambda found: other_than(found, "plain"),
        loose=("it",),
    ),
    Case(
        name="schedules",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "condition": of("first condition")},
        more={
            "by resolution": painter("first condition", 0, schedule="FLUX: by resolution"),
            "uniform": painter("first condition", 0, schedule="uniform"),
        },
        keep={"it": IT, "by resolution": of("by resolution"), "uniform": of("uniform")},
        check=schedules_differ,
    ),
    Case(
        name="storage",
        node="DCDD_FluxDecoder",
        inputs={**PAINT, "condition": of("first condition"), "decoder": of("8-bit")},
        more={
            "8-bit": ("DCDD_LoadDecoder", {"storage": "8-bit"}),
            "8-bit streamed": ("DCDD_LoadDecoder", {"storage": "8-bit", "placement": "low VRAM"}),
            "bfloat16": ("DCDD_LoadDecoder", {"storage": "bfloat16", "placement": "CPU"}),
            "from a file": ("DCDD_LoadDecoder", {"bundle": "bundle.safetensors", "vae": "pico/"}),
            "exact": painter("first condition", 0),
            "streamed": painter("first condition", 0, decoder=of("8-bit streamed")),
            "half": painter("first condition", 0, decoder=of("bfloat16")),
            "file": painter("first condition", 0, decoder=of("from a file")),
        },
        keep={"it": IT, **{name: of(name) for name in ("exact", "streamed", "half", "file")}},
        check=stored_is_close,
        loose=("it", "streamed", "half"),
    ),
    Case(
        name="pico takes no other autoencoder",
        node="DCDD_LoadDecoder",
        inputs={"vae": "pico/"},
        more={"painted": painter("first condition", 0, decoder=IT), "usual": painter("first condition", 0)},
        keep={"it": of("painted"), "given": of("usual")},
        check=nothing_painted,
        notice="base_model and vae are not used",
    ),
    Case(
        name="statistics",
        node="DCDD_LogitStatistics",
        inputs={"token_logits": of("sampled"), "token_logits_b": of("proxies"), "names": "one, two"},
        keep={"it": IT, "table": of("it", 1)},
        check=statistics_are_told,
        reports=[(k, 4) for k in range(1, 5)],
    ),
    Case(
        name="comparison",
        node="DCDD_CompareDecoders",
        inputs={"image_a": of("black"), "image_b": of("white"), "side": 96},
        more={"black": ("TEST_Picture", {"fill": "0"}), "white": ("TEST_Picture", {"fill": "1"})},
        check=black_left_of_white,
    ),
    Case(
        name="one image to compare",
        node="DCDD_CompareDecoders",
        inputs={"image_a": of("white"), "side": 96},
        more={"white": ("TEST_Picture", {"fill": "1"})},
        check=one_image_alone,
    ),
    Case(
        name="pico as a core model",
        node="DCDD_LoadPicoModel",
        more={
            "latent": ("VAEEncode", {"pixels": of("scenes"), "vae": of("it", 1)}),
            "decoded": ("VAEDecode", {"samples": of("latent"), "vae": of("it", 1)}),
            "sampled model": (sampler(IT)[0], sampler(IT)[1] | {"positive": of("it", 2), "negative": of("it", 2)}),
            "painted": ("VAEDecode", {"samples": of("sampled model"), "vae": of("it", 1)}),
        },
        keep={"decoded": of("decoded"), "painted": of("painted"), "given": of("scenes")},
        check=vae_is_picos,
    ),
    Case(
        name="guided as the tokens say",
        node="DCDD_DistributionGuidance",
        inputs=GUIDED,
        more={
            "a": sampler(IT),
            "b": sampler(of("pico model")),
            "image": decoded("a"),
            "plain": decoded("b"),
            "read": read(of("image")),
            "read plain": read(of("plain")),
        },
        keep={
            "agreement of it": of("read"),
            "noisy of it": of("read", 1),
            "agreement of unguided": of("read plain"),
            "noisy of unguided": of("read plain", 1),
        },
        check=guidance_is_followed,
        loose=("agreement of it", "noisy of it", "agreement of unguided", "noisy of unguided"),
    ),
    *(
        Case(
            name=f"guidance that is off: {name}",
            node="DCDD_DistributionGuidance",
            inputs={**GUIDED, **values},
            more={"a": sampler(IT, steps=3), "b": sampler(of("pico model"), steps=3)},
            keep={"it": of("a"), "unguided": of("b")},
            check=lambda found: same(found.arrays["it"]["samples"], found.arrays["unguided"]["samples"]),
        )
        for name, values in (
            ("no strength, whatever the pull", {"strength": 0.0}),
            ("before its start", {"start_percent": 1.0}),
            ("after its end", {"end_percent": 0.0}),
        )
    ),
    *(
        Case(
            name=f"guided with another {name}",
            node="DCDD_DistributionGuidance",
            inputs={**GUIDED, name: value},
            more={"a": sampler(IT, steps=2), "b": sampler(of("guided"), steps=2)},
            keep={"it": of("a"), "usual": of("b")},
            check=guidance_is_another,
            loose=("it", "usual"),
        )
        for name, value in (
            ("strength", 0.2),
            ("pull", 0.5),
            ("end_percent", 0.6),
            ("every", 2),
            ("weight", "uniform"),
            ("codes", "hard: the tokens"),
        )
    ),
    Case(
        name="guided under a mask for each image",
        node="DCDD_DistributionGuidance",
        inputs={**GUIDED, "mask": of("two masks")},
        more={
            "two masks": ("DCDD_UncertaintyMask", DOUBT),
            "first mask": one_of("two masks", 0),
            "by the first": ("DCDD_DistributionGuidance", {**GUIDED, "mask": of("first mask")}),
            "a": sampler(IT, steps=2),
            "b": sampler(of("by the first"), steps=2),
        },
        keep={"it": of("a"), "by the first": of("b")},
        check=each_is_guided_under_its_own,
        loose=("it", "by the first"),
    ),
    Case(
        name="guided under a mask",
        node="DCDD_DistributionGuidance",
        inputs={**GUIDED, "mask": of("left half")},
        more={
            "left half": ("TEST_Mask", {"bottom": SIDE, "right": SIDE // 2, "value": 1.0}),
            "a": (sampler(IT)[0], sampler(IT)[1] | {"denoise": 1.0}),
            "image": decoded("a"),
            "read": read(of("image")),
        },
        keep={"differs": of("read", 2)},
        check=followed_under_the_mask,
        loose=("differs",),
    ),
    Case(
        name="latent to start from",
        node="DCDD_TokenGuideLatent",
        inputs=SHARPENED,
        more={
            "soft": ("DCDD_VQVAEDecode", {**FOLLOWED, "codes": "soft: the expected codes"}),
            "decoded": ("VAEDecode", {"samples": IT, "vae": of("pico model", 1)}),
        },
        keep={
            "it": IT,
            "denoise": of("it", 1),
            "image": of("it", 2),
            "soft": of("soft"),
            "decoded": of("decoded"),
        },
        check=latent_is_the_soft_image,
    ),
    Case(
        name="latent of the tokens alone",
        node="DCDD_TokenGuideLatent",
        inputs={**SHARPENED, "codes": "hard: the tokens", "start": 0.3},
        more={"hard": ("DCDD_VQVAEDecode", FOLLOWED)},
        keep={"denoise": of("it", 1), "image": of("it", 2), "hard": of("hard")},
        check=latent_is_the_tokens_image,
    ),
    Case(
        name="latent of another shape",
        node="DCDD_TokenGuideLatent",
        inputs={**SHARPENED, "width": 128, "height": 192},
        keep={"it": IT, "image": of("it", 2)},
        check=latent_is_larger,
        notice="stretched to 128 x 192",
    ),
    Case(
        name="latent of sides that do not fit",
        node="DCDD_TokenGuideLatent",
        inputs={**SHARPENED, "vae": of("flux vae"), "width": 100, "height": 100},
        keep={"image": of("it", 2)},
        check=lambda found: same(np.array(found["image"].shape), np.array((2, 96, 96, 3))),
        notice="multiples of 8 pixels",
    ),
    Case(
        name="sharpened",
        node="DCDD_SharpenToTokens",
        inputs={**SHARPENED, "steps": 4},
        more={
            "decoded": ("VAEDecode", {"samples": of("it", 1), "vae": of("pico model", 1)}),
            "read": read(IT),
            "read soft": read(of("guide latent", 2)),
        },
        keep={"it": IT, "decoded": of("decoded"), "agreement": of("read"), "agreement of soft": of("read soft")},
        check=sharpened_says_more,
        reports=[(k, 8) for k in range(1, 9)],
        previews=8,
        loose=("it", "decoded", "agreement", "agreement of soft"),
    ),
    Case(
        name="sharpened by nothing",
        node="DCDD_SharpenToTokens",
        inputs={**SHARPENED, "steps": 1, "strength": 0.0},
        more={"plain": decoded("guide latent")},
        keep={"it": IT, "plain": of("plain")},
        check=lambda found: np.testing.assert_allclose(found["it"], found["plain"], atol=0.01),
        loose=("it", "plain"),
    ),
    Case(
        name="sharpened images of one's own",
        node="DCDD_SharpenToTokens",
        inputs={**SHARPENED, "token_logits": of("proxies"), "calibration": of("calibration"), "steps": 2},
        keep={"it": IT, "given": of("scenes")},
        check=painted_is_the_scene,
        loose=("it",),
    ),
    Case(
        name="sharpened without previews",
        node="DCDD_SharpenToTokens",
        inputs={**SHARPENED, "token_logits": of("calibrated"), "steps": 1},
        check=anything,
        previews=0,
        previewing="none",
        loose=("it",),
    ),
    Case(
        name="agreement",
        node="DCDD_TokenAgreement",
        inputs={"image": of("image"), **FOLLOWED},
        more={
            "image": ("DCDD_VQVAEDecode", FOLLOWED),
            "read": ("DCDD_VQVAEEncode", {"vq_vae": of("vq"), "image": of("image")}),
        },
        keep={
            "it": IT,
            "noisy": of("it", 1),
            "differs": of("it", 2),
            "read": of("read"),
            "sampled": of("sampled"),
        },
        check=agreement_is_counted,
        notice="of the tokens are read in the image",
        reports=[(1, 2), (2, 2)],
        loose=("it", "noisy", "differs", "read", "sampled"),
    ),
    Case(
        name="download that is there",
        node="DCDD_DownloadModel",
        inputs={"model": DOWNLOADED},
        check=file_is_told,
        notice="models/vae/ae.safetensors",
        there="models/vae/ae.safetensors",
        loose=("it",),
    ),
]


def _refusals() -> list[Refusal]:
    missing = "gone.safetensors"
    numbers = [
        Refusal(
            name=f"{name} that is no number",
            node=node,
            inputs={**inputs, name: "nan"},
            says=("nan", "finite number", name),
        )
        for node, inputs, names in (
            ("DCDD_JanusLogitSampler", DRAW, ("guidance", "temperature", "top_p")),
            (PROGRESSIVE, REVEAL, ("guidance", "temperature", "top_p")),
            ("DCDD_UncertaintyMask", DOUBT, ("threshold", "blur")),
            ("DCDD_FluxDecoder", PAINT, ("strength", "guidance")),
            ("DCDD_DistributionGuidance", GUIDED, ("strength", "pull", "start_percent", "end_percent")),
            ("DCDD_TokenGuideLatent", SHARPENED, ("start",)),
            ("DCDD_SharpenToTokens", SHARPENED, ("strength",)),
        )
        for name in names
    ]
    sockets = [
        Refusal(
            name=f"{value!r} as {name} of {node}",
            node=node,
            inputs={**inputs, name: value},
            says=(f"{name} got {type(value).__name__} '?{value}", "connect|choose"),
        )
        for node, inputs, names in (
            ("DCDD_JanusLogitSampler", DRAW, ("janus",)),
            (PROGRESSIVE, {**REVEAL, "mask": of("mask")}, ("janus", "token_logits")),
            ("DCDD_VQVAEEncode", {"vq_vae": of("vq"), "image": of("noise")}, ("vq_vae",)),
            ("DCDD_LogitCalibrator", {**PROXIES, "decoder": of("decoder")}, ("token_logits", "vq_vae", "decoder")),
            ("DCDD_SaveCalibration", {"calibration": of("calibration")}, ("calibration",)),
            ("DCDD_LCDMEncoder", {**PROXIES, "decoder": of("decoder")}, ("token_logits", "vq_vae", "decoder")),
            ("DCDD_UncertaintyMask", DOUBT, ("condition",)),
            ("DCDD_VQVAEDecode", PROXIES, ("token_logits", "vq_vae")),
            ("DCDD_FluxDecoder", PAINT, ("decoder", "condition", "vq_vae")),
            ("DCDD_LogitStatistics", {"token_logits": of("proxies")}, ("token_logits",)),
            ("DCDD_DistributionGuidance", GUIDED, ("vae", "token_logits", "vq_vae", "calibration")),
            ("DCDD_TokenGuideLatent", SHARPENED, ("vae", "token_logits", "vq_vae")),
            ("DCDD_SharpenToTokens", SHARPENED, ("vae", "token_logits", "vq_vae")),
            ("DCDD_TokenAgreement", {"image": of("scenes"), **FOLLOWED}, ("token_logits", "vq_vae")),
        )
        for name in names
        for value in (5, "text")
    ]
    choices = [
        Refusal(
            name=f"{name} of {node} that is not offered",
            node=node,
            inputs={**inputs, name: "odd"},
            says=("odd", says),
            listed=True,
        )
        for node, inputs, name, says in (
            ("DCDD_LoadJanus", {}, "dtype", "bfloat16"),
            ("DCDD_LoadJanus", {}, "placement", "low VRAM"),
            ("DCDD_LoadDecoder", {}, "storage", "8-bit"),
            ("DCDD_VQVAEDecode", PROXIES, "codes", "soft: the expected codes"),
            ("DCDD_FluxDecoder", PAINT, "schedule", "uniform"),
            ("DCDD_LCDMEncoder", PROXIES, "reads", "sampled tokens alone"),
            ("DCDD_UncertaintyMask", DOUBT, "feature", "choose|tail entropy"),
            ("DCDD_UncertaintyMask", DOUBT, "edge", "choose|soft"),
            ("DCDD_DownloadModel", {}, "model", AUTOENCODER),
            (PROGRESSIVE, REVEAL, "order", "halton"),
            ("DCDD_DistributionGuidance", GUIDED, "codes", "hard: the tokens"),
            ("DCDD_DistributionGuidance", GUIDED, "weight", "uniform"),
        )
    ]
    files = [
        Refusal(
            name=f"{name} of {node} {inputs.get('bundle', '')} that is not there",
            node=node,
            inputs={**inputs, name: missing},
            says=(missing, "is not in .*models", "press R"),
            listed=True,
        )
        for node, inputs, name in (
            ("DCDD_LoadJanus", {}, "model"),
            ("DCDD_LoadVQVAE", {}, "model"),
            ("DCDD_LoadDecoder", {}, "bundle"),
            ("DCDD_LoadDecoder", {"bundle": "bundle.safetensors"}, "base_model"),
            ("DCDD_LoadDecoder", {"bundle": "bundle.safetensors"}, "vae"),
            ("DCDD_LoadDecoder", {"bundle": PICO}, "base_model"),
            ("DCDD_LoadDecoder", {"storage": "auto"}, "vae"),
            ("DCDD_LoadCalibration", {}, "file"),
        )
    ]
    images = [
        Refusal(name=f"{what} at {node}", node=node, inputs={**inputs, name: of(what)}, says=says)
        for what, says in (
            ("nan image", ("NaN", "earlier node")),
            ("two channels", ("96 x 96 pixels of 2 channels", "IMAGE", "connect")),
        )
        for node, inputs, name in (
            ("DCDD_VQVAEEncode", {"vq_vae": of("vq")}, "image"),
            ("DCDD_FluxDecoder", {**PAINT, "mask": of("mask")}, "image"),
            ("DCDD_UncertaintyMask", DOUBT, "image"),
            ("DCDD_CompareDecoders", {"image_b": of("noise")}, "image_a"),
            ("DCDD_TokenAgreement", FOLLOWED, "image"),
        )
    ]
    edit = {**DRAW, "token_logits": of("calibrated")}
    masks = [
        Refusal(name=f"{what} at {node}", node=node, inputs={**inputs, "mask": of(what)}, says=says)
        for what, says in (
            ("nan mask", ("mask", "NaN", "earlier node")),
            ("three masks", ("3", "2", "mask", "connect one")),
        )
        for node, inputs in (
            ("DCDD_FluxDecoder", {**PAINT, "image": of("noise")}),
            ("DCDD_JanusLogitSampler", edit),
            (PROGRESSIVE, {**REVEAL, "token_logits": of("calibrated")}),
        )
    ]
    return [
        *numbers,
        *sockets,
        *choices,
        *files,
        *images,
        *masks,
        Refusal(
            name="guidance of a decoder without the tokenizer",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "strength": 0.1},
            says=("vq_vae got NoneType", "connect the vq_vae"),
        ),
        Refusal(
            name="guidance of a decoder below zero",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "strength": -0.5},
            says=("strength must be 0 or more, or -1 for the decoder's own, got -0.5",),
        ),
        Refusal(
            name="guidance on the condition below zero",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "guidance": -0.5},
            says=("guidance must be 0 or more, or -1 for the decoder's own, got -0.5",),
        ),
        Refusal(
            name="guidance on the condition of a decoder that was never without one",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "guidance": 2.0},
            says=("condition_guidance must be 1, which is off, got 2", "never saw an image without its condition"),
        ),
        Refusal(
            name="guidance of a decoder by another tokenizer",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "strength": 0.1, "vq_vae": of("other vq")},
            says=("tokens of pico", "another codebook", "that the LCDM Encoder has"),
        ),
        Refusal(
            name="text as a model",
            node="DCDD_DistributionGuidance",
            inputs={**GUIDED, "model": "text"},
            says=("model got str 'text'", "connect a diffusion model"),
        ),
        Refusal(
            name="guidance that ends before it starts",
            node="DCDD_DistributionGuidance",
            inputs={**GUIDED, "start_percent": 0.8, "end_percent": 0.2},
            says=("starts at 0.8 and ends at 0.2", "must not be larger"),
        ),
        Refusal(
            name="guidance by uncalibrated logits of an image",
            node="DCDD_DistributionGuidance",
            inputs={**GUIDED, "token_logits": of("proxies")},
            says=("not calibrated", "connect a calibration, or put a Logit Calibrator"),
        ),
        Refusal(
            name="guidance calibrated twice",
            node="DCDD_DistributionGuidance",
            inputs={**GUIDED, "token_logits": of("calibrated"), "calibration": of("calibration")},
            says=("calibrated already",),
        ),
        Refusal(
            name="guidance of a film",
            node="DCDD_DistributionGuidance",
            inputs={**GUIDED, "vae": of("film vae")},
            says=("video or sound", "models of images"),
        ),
        Refusal(
            name="guidance through another model's VAE",
            node="KSampler",
            inputs=sampler(of("guided by another"))[1],
            more={
                "guided by another": ("DCDD_DistributionGuidance", {**GUIDED, "vae": of("coarse vae")}),
            },
            says=("latents of 4 x", "paints 16 x", "connect the VAE of this model"),
        ),
        Refusal(
            name="guidance of another number of images",
            node="KSampler",
            inputs=sampler(of("guided"), "first guide latent")[1],
            says=("batch of 1, token_logits one of 2", "Token Guide Latent"),
        ),
        Refusal(
            name="guidance under another number of masks",
            node="KSampler",
            inputs=sampler(of("guided under three"))[1],
            more={"guided under three": ("DCDD_DistributionGuidance", {**GUIDED, "mask": of("three masks")})},
            says=("mask is a batch of 3", "connect one for all, or 2"),
        ),
        Refusal(
            name="agreement of another number of images",
            node="DCDD_TokenAgreement",
            inputs={"image": of("three"), **FOLLOWED},
            says=("batch of 3", "one of 2", "painted from these tokens"),
        ),
        Refusal(
            name="text as a mask",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "image": of("noise"), "mask": "text"},
            says=("str 'text'", "MASK", "connect"),
        ),
        Refusal(
            name="blank prompt",
            node="DCDD_JanusLogitSampler",
            inputs={**DRAW, "prompt": " \n "},
            says=("prompt is blank", "say what to draw"),
        ),
        Refusal(
            name="tokens without a mask",
            node="DCDD_JanusLogitSampler",
            inputs=edit,
            says=("token_logits and a mask", "connect both"),
        ),
        Refusal(
            name="passes of a model that has none",
            node=PROGRESSIVE,
            inputs=DRAW,
            says=(
                "pico samples one token after the other",
                "connect it to a Janus Logit Sampler",
                r"Load Janus, such as 'pico progressive \(built in\)'",
            ),
        ),
        *(
            Refusal(
                name=f"{number} parallel tokens",
                node="DCDD_JanusLogitSampler",
                inputs={**DRAW, "parallel_tokens": of("number")},
                more={"number": ("TEST_Interrupt", {"value": number, "node": "nobody"})},
                says=(r"parallel_tokens must be a whole number in 0\.\.1,024", "0 is automatic, 1 is off"),
            )
            for number in (-1, 1025, "many")
        ),
        Refusal(
            name="parallel tokens of a masked sampler",
            node="DCDD_JanusLogitSampler",
            inputs={"janus": of("masked"), "parallel_tokens": 8},
            says=("parallel_tokens is 8", "masked is a masked sampler", "set it to 0", "Progressive Token Sampler"),
        ),
        Refusal(
            name="order that a model cannot give",
            node=PROGRESSIVE,
            inputs={"janus": of("bigfix"), "prompt": "a red circle", "order": "importance"},
            more={"bigfix": ("DCDD_LoadJanus", {"model": "bigfix"})},
            says=("importance", "was not trained to predict", "choose"),
        ),
        Refusal(
            name="start without tokens",
            node=PROGRESSIVE,
            inputs={**REVEAL, "start": 2},
            says=("start is 2", "no tokens to start from", "connect token_logits", "set start to 0"),
        ),
        Refusal(
            name="mask without tokens to start from",
            node=PROGRESSIVE,
            inputs={**REVEAL, "start": 2, "mask": of("mask")},
            says=("token_logits and a mask", "connect both"),
        ),
        Refusal(
            name="tokens without a mask that are not to start from",
            node=PROGRESSIVE,
            inputs={**REVEAL, "token_logits": of("calibrated")},
            says=("token_logits and a mask", "connect both", "start to 1 or more"),
        ),
        Refusal(
            name="start after the last pass",
            node=PROGRESSIVE,
            inputs={**STARTED, "start": 9},
            says=("start must be less than passes, got 9 of 9", "has to draw"),
        ),
        Refusal(
            name="revision passes alone",
            node=PROGRESSIVE,
            inputs={**REVEAL, "passes": 4, "revision_passes": 4},
            says=("revision_passes must be less than passes, got 4 of 4", "has to reveal"),
        ),
        Refusal(
            name="revision of nothing",
            node=PROGRESSIVE,
            inputs={**REVEAL, "revision_passes": 1, "revise": 0},
            says=("1 revision_passes have nothing to draw again", "set revision_passes to 0, or revise to -1"),
        ),
        Refusal(
            name="revision of nothing by a model that never revises",
            node=PROGRESSIVE,
            inputs={"janus": of("loaded"), "prompt": "a red circle", "revision_passes": 3},
            more={"loaded": ("DCDD_LoadJanus", {"model": "amused"})},
            says=("revise is -1, since this model's own is 0", "set revision_passes to 0, or revise to more than 0"),
        ),
        Refusal(
            name="blank prompt of a masked sampler",
            node=PROGRESSIVE,
            inputs={**REVEAL, "prompt": " \n "},
            says=("prompt is blank", "say what to draw"),
        ),
        Refusal(
            name="tokens drawn again among uncalibrated ones",
            node=PROGRESSIVE,
            inputs={**REVEAL, "token_logits": of("proxies"), "mask": of("mask")},
            says=("straight from a VQ-VAE Encode", "add a Logit Calibrator"),
        ),
        Refusal(
            name="tokens drawn again among another model's",
            node=PROGRESSIVE,
            inputs={**REVEAL, "token_logits": of("other proxies"), "mask": of("mask")},
            says=("come from another", "janus is masked", "codebook", "connect"),
        ),
        Refusal(
            name="lines that do not come out even",
            node="DCDD_JanusLogitSampler",
            inputs={**edit, "mask": of("mask"), "prompt": "red\nblue\ngreen", "prompt_per_line": True},
            says=("3 lines", "2 (images|pictures)", "write one"),
        ),
        Refusal(
            name="edit of uncalibrated tokens",
            node="DCDD_JanusLogitSampler",
            inputs={**DRAW, "token_logits": of("proxies"), "mask": of("mask")},
            says=("straight from a VQ-VAE Encode", "add a Logit Calibrator"),
        ),
        Refusal(
            name="edit of another grid",
            node="DCDD_JanusLogitSampler",
            inputs={**DRAW, "token_logits": of("small calibrated"), "mask": of("mask")},
            says=("64 x 64", "pico samples 96 x 96", "crop to a square: 96 x 96"),
        ),
        Refusal(
            name="edit of another grid and uncalibrated",
            node="DCDD_JanusLogitSampler",
            inputs={**DRAW, "token_logits": of("small proxies"), "mask": of("mask")},
            says=("add a Logit Calibrator", "crop to a square: 96 x 96"),
        ),
        Refusal(
            name="edit of calibrated samples",
            node="DCDD_JanusLogitSampler",
            inputs={**DRAW, "token_logits": of("calibrated samples"), "mask": of("mask")},
            more={
                "calibrated samples": (
                    "DCDD_LogitCalibrator",
                    {"token_logits": of("sampled"), "vq_vae": of("vq"), "decoder": of("decoder")},
                )
            },
            says=("sampled and then calibrated", "without the Logit Calibrator"),
        ),
        Refusal(
            name="edit of another model's tokens",
            node="DCDD_JanusLogitSampler",
            inputs={**DRAW, "token_logits": of("other proxies"), "mask": of("mask")},
            says=("come from another", "janus is pico", "codebook", "connect"),
        ),
        *(
            Refusal(
                name=f"tokens of another codebook at {node}: {says}",
                node=node,
                inputs={"token_logits": of("other proxies"), **inputs},
                says=("another", "codebook", says),
            )
            for node, inputs, says in (
                ("DCDD_LCDMEncoder", {"vq_vae": of("vq")}, "connect the vq_vae"),
                ("DCDD_LCDMEncoder", {"vq_vae": of("other vq"), "decoder": of("decoder")}, "use pico in the Load"),
                ("DCDD_VQVAEDecode", {"vq_vae": of("vq")}, "connect the vq_vae"),
                ("DCDD_LogitCalibrator", {"vq_vae": of("other vq"), "decoder": of("decoder")}, "calibration was made"),
            )
        ),
        *(
            Refusal(
                name=f"LlamaGen at {node}: {says[-1]}",
                node=node,
                inputs=inputs,
                more={"its condition": ("DCDD_LCDMEncoder", {"token_logits": of("of llamagen"), "vq_vae": VQ_16})},
                says=says,
            )
            for node, inputs, says in (
                (
                    "DCDD_LCDMEncoder",
                    {"token_logits": of("of llamagen"), "vq_vae": VQ_16, "decoder": of("decoder")},
                    ("trained for pico", "vq_vae is t2i_tiny", "use pico in", "for t2i_tiny; .* Distribution Guidance"),
                ),
                (
                    "DCDD_FluxDecoder",
                    {**PAINT, "condition": of("its condition")},
                    ("tokens of t2i_tiny", "trained for pico", "use pico in", "for t2i_tiny; .* Distribution Guidance"),
                ),
                (
                    "DCDD_LogitCalibrator",
                    {"token_logits": of("of llamagen"), "vq_vae": VQ_16, "decoder": of("decoder")},
                    ("calibration was made for pico", "vq_vae is t2i_tiny", "was made for this model"),
                ),
                (
                    "DCDD_VQVAEDecode",
                    {"token_logits": of("of llamagen"), "vq_vae": of("vq")},
                    ("come from t2i_tiny", "vq_vae from pico", "connect the vq_vae"),
                ),
                (
                    "DCDD_JanusLogitSampler",
                    {"janus": of("llamagen"), "token_logits": of("calibrated"), "mask": of("mask")},
                    ("come from pico", "janus is t2i_tiny", "connect token_logits that t2i_tiny"),
                ),
                (PROGRESSIVE, {"janus": of("llamagen")}, ("t2i_tiny samples one", "connect it to a Janus Logit")),
            )
        ),
        Refusal(
            name="condition of another model",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "condition": of("other condition")},
            more={
                "other condition": ("DCDD_LCDMEncoder", {"token_logits": of("other proxies"), "vq_vae": of("other vq")})
            },
            says=("made of tokens of another", "trained for pico", "use pico"),
        ),
        Refusal(
            name="uncalibrated condition",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "condition": of("uncalibrated condition")},
            says=("not calibrated", "smear", "connect the decoder to the LCDM Encoder too"),
        ),
        Refusal(
            name="calibrated twice",
            node="DCDD_LogitCalibrator",
            inputs={"token_logits": of("calibrated"), "vq_vae": of("vq"), "decoder": of("decoder")},
            says=("calibrated already", "take one of the two Logit Calibrators out"),
        ),
        Refusal(
            name="calibration fitted to samples",
            node="DCDD_LogitCalibrator",
            inputs={"token_logits": of("sampled"), "vq_vae": of("vq"), "reference": of("sampled")},
            says=("of images, got sampled", "connect a VQ-VAE Encode to token_logits"),
        ),
        Refusal(
            name="calibration fitted to an image's logits",
            node="DCDD_LogitCalibrator",
            inputs={**PROXIES, "reference": of("proxies")},
            says=("got those of an image", "connect a Janus Logit Sampler"),
        ),
        Refusal(
            name="calibration fitted to an edited image",
            node="DCDD_LogitCalibrator",
            inputs={**PROXIES, "reference": of("edited")},
            more={
                "edited": (
                    "DCDD_JanusLogitSampler",
                    {**DRAW, "token_logits": of("calibrated"), "mask": of("mask"), "seed": 77},
                )
            },
            says=("got those of an image", "connect a Janus Logit Sampler"),
        ),
        Refusal(
            name="no calibration",
            node="DCDD_LogitCalibrator",
            inputs=PROXIES,
            says=("none", "decoder, calibration and reference", "connect exactly one"),
        ),
        Refusal(
            name="two calibrations",
            node="DCDD_LogitCalibrator",
            inputs={**PROXIES, "decoder": of("decoder"), "calibration": of("calibration")},
            says=("2 of", "decoder, calibration and reference", "connect exactly one"),
        ),
        Refusal(
            name="decoder without a calibration",
            node="DCDD_LogitCalibrator",
            inputs={**PROXIES, "decoder": of("uncalibrated")},
            says=("without a calibration", "connect one from a file"),
        ),
        *(
            Refusal(
                name=f"calibration called {name!r}",
                node="DCDD_SaveCalibration",
                inputs={"calibration": of("calibration"), "name": name},
                says=("not a valid file name", "letters"),
            )
            for name in ("", "../outside", ".hidden")
        ),
        Refusal(
            name="calibration of an empty list",
            node="DCDD_LoadCalibration",
            inputs={"file": "none yet: fit one and save it"},
            says=("no calibration", "Logit Calibrator", "press R"),
            listed=True,
        ),
        Refusal(
            name="half a calibration",
            node="DCDD_LoadCalibration",
            inputs={"file": "cut.safetensors"},
            says=("cut.safetensors", "damaged"),
        ),
        Refusal(
            name="half a bundle",
            node="DCDD_LoadDecoder",
            inputs={"bundle": "cut.safetensors", "vae": "pico/"},
            says=("cut.safetensors", "download it again"),
        ),
        Refusal(
            name="pico that is not there",
            node="DCDD_LoadJanus",
            inputs={"dtype": "float32"},
            says=("pico", "weights", "again"),
            away=f"custom_nodes/{PACK}/dcdd_pico/weights",
        ),
        Refusal(
            name="pico in passes that is not there",
            node="DCDD_LoadJanus",
            inputs={"model": PICO_PROGRESSIVE, "dtype": "float32"},
            says=("pico progressive", "weights", "install the pack again"),
            away=f"custom_nodes/{PACK}/dcdd_pico/weights/progressive",
        ),
        Refusal(
            name="pico LlamaGen that is not there",
            node="DCDD_LoadJanus",
            inputs={"model": PICO_LLAMAGEN, "dtype": "float32"},
            says=("pico llamagen", "weights", "install the pack again"),
            away=f"custom_nodes/{PACK}/dcdd_pico/weights/llamagen",
        ),
        Refusal(
            name="download without a network",
            node="DCDD_DownloadModel",
            inputs={"model": DOWNLOADED},
            says=("OFFLINE", "unset"),
        ),
        *(
            Refusal(
                name=f"{given} alone",
                node="DCDD_FluxDecoder",
                inputs={**PAINT, given: COMBINED[given]},
                says=("image and a mask", "connect both"),
            )
            for given in COMBINED
        ),
        Refusal(
            name="another number of images",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "image": of("three"), "mask": of("mask")},
            says=("image is a batch of 3", "one of 2", "connect one for all"),
        ),
        Refusal(
            name="no autoencoder",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "decoder": of("bare")},
            says=("without an autoencoder", "choose one .*connect a FLUX VAE"),
        ),
        Refusal(
            name="text as a VAE",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "vae": "text"},
            says=("str", "FLUX VAE", "connect"),
        ),
        Refusal(
            name="VAE of another kind",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "decoder": of("bare"), "vae": of("coarse vae")},
            says=("4 channels at 1/8", "16 at 1/4", "connect the VAE that it was trained with"),
        ),
        Refusal(
            name="VAE of another kind beside the decoder's own",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "vae": of("coarse vae")},
            says=("4 channels at 1/8", "16 at 1/4", "disconnect vae"),
        ),
        Refusal(
            name="VAE of another scale",
            node="DCDD_FluxDecoder",
            inputs={**FLUX, "vae": of("small vae")},
            more={"small vae": ("TEST_RandomVAE", {"factor": 8, "spread": 0.65})},
            says=("another model's", "spread of 0", "about 2.77", "disconnect vae"),
        ),
        Refusal(
            name="VAE that encodes to NaN",
            node="DCDD_FluxDecoder",
            inputs={**FLUX, "vae": of("nan vae")},
            more={"nan vae": ("TEST_RandomVAE", {"factor": 8, "spread": "nan"})},
            says=("connected VAE encodes .* NaN", "--fp32-vae", "another one"),
        ),
        Refusal(
            name="VAE of films",
            node="DCDD_FluxDecoder",
            inputs={**PAINT, "vae": of("film vae")},
            more={"film vae": ("TEST_RandomVAE", {"film": True})},
            says=("video or sound", "16 at 1/4", "disconnect vae"),
        ),
        Refusal(
            name="two columns of one name",
            node="DCDD_LogitStatistics",
            inputs={"token_logits": of("proxies"), "token_logits_b": of("proxies"), "names": "same, same"},
            says=("same", "give each"),
        ),
        Refusal(
            name="batches that do not fit side by side",
            node="DCDD_CompareDecoders",
            inputs={"image_a": of("noise"), "image_b": of("three")},
            says=("2, 3", "side by side", "connect"),
        ),
    ]


REFUSALS = _refusals()

INTERRUPTIONS = [
    Interruption("DCDD_PicoScene", {"batch_size": 3, "seed": 1}, armed="seed"),
    Interruption("DCDD_JanusLogitSampler", DRAW, armed="janus", report=30),
    Interruption(PROGRESSIVE, REVEAL, armed="janus", report=3),
    # After its last pass, while the sheets have the passes still to decode.
    Interruption(PROGRESSIVE, {**REVEAL, "passes": 2}, armed="janus", report=2),
    Interruption("DCDD_VQVAEEncode", {"vq_vae": of("vq"), "image": of("three")}, armed="image"),
    Interruption("DCDD_LogitCalibrator", {**PROXIES, "reference": of("sampled")}, armed="reference", report=3),
    Interruption("DCDD_LCDMEncoder", PROXIES, armed="token_logits"),
    Interruption("DCDD_VQVAEDecode", PROXIES, armed="token_logits"),
    Interruption("DCDD_FluxDecoder", {**PAINT, "steps": 8}, armed="condition", report=3),
    # After its last step, while the autoencoder has the images still to decode.
    Interruption("DCDD_FluxDecoder", PAINT, armed="condition", report=2),
    Interruption("DCDD_SharpenToTokens", SHARPENED, armed="token_logits", report=3),
    Interruption("DCDD_TokenAgreement", {"image": of("scenes"), **FOLLOWED}, armed="image"),
    Interruption(
        "DCDD_LogitStatistics",
        {"token_logits": of("sampled"), "token_logits_b": of("proxies")},
        armed="token_logits",
    ),
]

# --- workflows --------------------------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
#: They need the user's FLUX files: their graphs are checked, and not run.
WITH_FLUX = [path for path in WORKFLOWS if "your own FLUX" in path.stem]
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))
RUNNABLE = [path for path in WORKFLOWS if path not in WITH_FLUX] + SUBGRAPHS


def workflow_prompt(path: Path, info: Values) -> tuple[Values, list[str]]:
    """A workflow's or blueprint's prompt, of two steps and images at most, and the names that its ends are kept by."""
    graph = Graph(info)
    saved = json.loads(path.read_text("utf-8"))
    if path in SUBGRAPHS:
        janus = graph.add("janus", "DCDD_LoadJanus")
        given = {"janus": janus, "vq_vae": of("janus", 1), "decoder": graph.add("decoder", "DCDD_LoadDecoder")}
        inside, outputs = opened(saved, info, given)
        graph.prompt |= inside
        del outputs["latent"]  # pico has none to give
    else:
        graph.prompt = to_prompt(saved, info)
        outputs = {
            f"{kind} {name}": value
            for name, node in graph.prompt.items()
            if (kind := node["class_type"]) in ("SaveImage", "PreviewImage", "MaskPreview")
            for value in node["inputs"].values()
            if isinstance(value, tuple)
        }
    for node in graph.prompt.values():
        inputs = node["inputs"]
        inputs |= {"steps": 2} if node["class_type"] == "DCDD_FluxDecoder" else {}
        inputs |= {"batch_size": min(2, inputs["batch_size"])} if "batch_size" in inputs else {}
    names = []
    for name, link in outputs.items():
        names.append(f"{path.stem} {name}")
        graph.keep(link, names[-1])
    return graph.prompt, names
