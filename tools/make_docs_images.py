"""Draws the images of the help pages, web/docs/images/<NodeId>.jpg, from real results of the nodes.

    COMFYUI_DIR=~/ComfyUI ~/comfy-env/bin/python tools/make_docs_images.py

Run it with the Python that runs ComfyUI. It starts ComfyUI on the CPU in a temporary folder with this pack, runs two
small graphs on the embedded pico models (they use every node except the download), and combines previews and results
into one image per node. Run it again when the embedded weights change.

`--results DIR` keeps the raw results in DIR, and reuses them if they are already there. `--pack DIR` runs another copy
of the pack, for example one with other weights.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import matplotlib
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a large striped red heart in the centre on a wavy sky ground"
SEED, SCENE = 8, 0
#: For the nodes of distribution guidance: the ground's faint texture is what a model loses first.
RING, RING_SEED = "a large dotted orange ring in the centre on a woven slate ground", 1
CALIBRATION = "my calibration"
TOKENS_A_SIDE = 12  # pico's
#: Largest size of an image, so that pages load quickly and the pack stays small.
MOST_BYTES = 60_000

# --- graphs to run ----------------------------------------------------------------------------------------------------

Graph = dict[str, dict[str, Any]]

PICO, PICO_PROGRESSIVE = "pico (built in)", "pico progressive (built in)"
HARD, SOFT = "hard: the tokens", "soft: the expected codes"
FOLLOW = "soft: the distributions"
#: Strengths of guidance to compare; the last is too much.
STRENGTHS = (0.2, 0.4, 5.0)
STARTS = (0.3, 0.6, 0.9)
FEATURES = ("doubt: 1 - confidence", "narrow choice: 1 - margin", "spread: 1 - mass of the top k", "tail entropy")
#: Widget values, unless a graph gives others.
WIDGETS: dict[str, dict[str, Any]] = {
    "DCDD_LoadJanus": {"model": PICO, "dtype": "auto", "placement": "auto"},
    "DCDD_LoadVQVAE": {"model": PICO, "placement": "auto"},
    "DCDD_LoadDecoder": {
        "bundle": PICO,
        "base_model": "in the bundle",
        "vae": "with the bundle, or connected",
        "storage": "auto",
        "placement": "auto",
    },
    "DCDD_JanusLogitSampler": {
        "prompt": PROMPT,
        "seed": SEED,
        "guidance": 3.0,
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "batch_size": 1,
        "prompt_per_line": False,
        "parallel_tokens": 1,  # a preview for each row
    },
    "DCDD_ProgressiveTokenSampler": {
        "prompt": PROMPT,
        "passes": 0,
        "revision_passes": -1,
        "order": "the model's own",
        "spread": -1,
        "revise": -1,
        "start": 0,
        "seed": SEED,
        "guidance": -1.0,
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "batch_size": 1,
        "prompt_per_line": False,
    },
    "DCDD_VQVAEEncode": {"longest_side": 0},
    "DCDD_LogitCalibrator": {"anchored": False},
    "DCDD_LCDMEncoder": {"reads": "as measured best for the decoder"},
    "DCDD_UncertaintyMask": {
        "feature": FEATURES[0],
        "edge": "hard",
        "threshold": 0.5,
        "grow": 0,
        "blur": 0.0,
        "token_size": 8,
    },
    "DCDD_VQVAEDecode": {"codes": HARD},
    "DCDD_FluxDecoder": {"seed": SEED, "steps": 0, "schedule": "as measured best for the decoder"},
    "DCDD_PicoScene": {"seed": SCENE, "size": 96, "batch_size": 1},
    "DCDD_CompareDecoders": {"label_d": "", "side": 120},
    "DCDD_TokenGuideLatent": {"width": 0, "height": 0, "start": 0.6, "codes": FOLLOW},
    "DCDD_DistributionGuidance": {
        "strength": 0.4,
        "pull": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "every": 1,
        "weight": "confidence",
        "codes": FOLLOW,
    },
    "DCDD_SharpenToTokens": {"steps": 8, "strength": 0.1, "codes": FOLLOW},
    "KSampler": {
        "seed": SEED,
        "steps": 10,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    },
}


class Building:
    """A graph in ComfyUI's API format, built node by node; a link is "NODE" or "NODE.OUTPUT NUMBER"."""

    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, name: str, kind: str, /, *, saved: bool = False, output: int = 0, **inputs: Any) -> None:
        """
        Args:
            saved: whether to save the image of that output as NAME.
        """
        links = {key: self._link(value) for key, value in inputs.items()}
        self.graph[name] = {"class_type": kind, "inputs": WIDGETS.get(kind, {}) | links}
        if saved:
            self.graph[f"{name} saved"] = {
                "class_type": "SaveImage",
                "inputs": {"images": [name, output], "filename_prefix": name},
            }

    def _link(self, value: Any) -> Any:
        if not isinstance(value, str) or value.partition(".")[0] not in self.graph:
            return value
        name, _, number = value.partition(".")
        return [name, int(number or 0)]


def first_graph() -> Graph:
    """All nodes except Download Model, and Load Calibration, which needs the file that this graph writes."""
    b = Building()
    b.add("janus", "DCDD_LoadJanus")
    b.add("vq", "DCDD_LoadVQVAE")
    b.add("decoder", "DCDD_LoadDecoder")
    # Text to image.
    b.add("sampled", "DCDD_JanusLogitSampler", janus="janus")
    b.add("by_vq", "DCDD_VQVAEDecode", token_logits="sampled", vq_vae="janus.1", saved=True)
    b.add("by_vq_soft", "DCDD_VQVAEDecode", token_logits="sampled", vq_vae="janus.1", codes=SOFT, saved=True)
    b.add("condition", "DCDD_LCDMEncoder", token_logits="sampled", vq_vae="janus.1", decoder="decoder")
    b.add("painted", "DCDD_FluxDecoder", decoder="decoder", condition="condition", saved=True)
    b.add("masked", "DCDD_LoadJanus", model=PICO_PROGRESSIVE)
    b.add("passes", "DCDD_ProgressiveTokenSampler", janus="masked", saved=True, output=1)
    # Without the decoder: the uncertainty of Janus itself.
    b.add("uncertain", "DCDD_LCDMEncoder", token_logits="sampled", vq_vae="janus.1")
    for k, feature in enumerate(FEATURES):
        name = f"heat_{k}"
        b.add(name, "DCDD_UncertaintyMask", condition="uncertain", image="by_vq", feature=feature, saved=True, output=1)
    b.add("soft", "DCDD_UncertaintyMask", condition="uncertain", image="by_vq", edge="soft", grow=1, blur=0.7)
    b.add("hard_mask", "MaskToImage", mask="heat_0", saved=True)
    b.add("soft_mask", "MaskToImage", mask="soft", saved=True)
    repaint = {"image": "by_vq", "mask": "heat_0"}
    b.add("repainted", "DCDD_FluxDecoder", decoder="decoder", condition="condition", saved=True, **repaint)
    add_guidance(b)
    # Image to image.
    b.add("scenes", "DCDD_PicoScene", batch_size=2, saved=True)
    b.add("captions", "PreviewAny", source="scenes.1")
    b.add("scene", "ImageFromBatch", image="scenes", batch_index=0, length=1, saved=True)
    b.add("encoded", "DCDD_VQVAEEncode", vq_vae="vq", image="scene")
    b.add("again", "DCDD_VQVAEDecode", token_logits="encoded", vq_vae="vq", saved=True)
    b.add("raw_soft", "DCDD_VQVAEDecode", token_logits="encoded", vq_vae="vq", codes=SOFT, saved=True)
    b.add("seen", "DCDD_LCDMEncoder", token_logits="encoded", vq_vae="vq", decoder="decoder")
    b.add("rebuilt", "DCDD_FluxDecoder", decoder="decoder", condition="seen")
    labels = {"label_a": "the image", "label_b": "VQ-VAE decode", "label_c": "DCDD decode"}
    images = {"image_a": "scene", "image_b": "again", "image_c": "rebuilt"}
    b.add(
        "compared",
        "DCDD_CompareDecoders",
        captions="encoded, and decoded in two ways",
        saved=True,
        **labels,
        **images,
    )
    # A calibration, fitted as an artist would do it, but to fewer images.
    b.add("reference", "DCDD_JanusLogitSampler", janus="janus", seed=100, batch_size=16)
    b.add("many", "DCDD_PicoScene", seed=1000, batch_size=16)
    b.add("proxies", "DCDD_VQVAEEncode", vq_vae="vq", image="many")
    b.add("fitted", "DCDD_LogitCalibrator", token_logits="proxies", vq_vae="vq", reference="reference")
    columns = {"token_logits": "reference", "token_logits_b": "proxies", "token_logits_c": "fitted"}
    b.add("statistics", "DCDD_LogitStatistics", names="Janus, before, after", saved=True, **columns)
    b.add("table", "PreviewAny", source="statistics.1")
    b.add("kept", "DCDD_SaveCalibration", calibration="fitted.1", name=CALIBRATION)
    return b.graph


def add_guidance(b: Building) -> None:
    """Distribution guidance of pico's own diffusion model, and what it is compared with."""
    b.add("ring", "DCDD_JanusLogitSampler", janus="janus", prompt=RING, seed=RING_SEED)
    tokens = {"token_logits": "ring", "vq_vae": "janus.1"}
    b.add("ring_vq", "DCDD_VQVAEDecode", saved=True, **tokens)
    add_agreement(b, "ring_vq", **tokens)
    b.add("ring_soft", "DCDD_VQVAEDecode", codes=SOFT, saved=True, **tokens)
    b.add("ring_condition", "DCDD_LCDMEncoder", decoder="decoder", **tokens)
    b.add("trained", "DCDD_FluxDecoder", decoder="decoder", condition="ring_condition", saved=True)
    b.add("prior", "DCDD_LoadPicoModel")
    b.add("guide", "DCDD_TokenGuideLatent", vae="prior.1", saved=True, output=2, **tokens)

    def paint(name: str, model: str, **options: Any) -> None:
        given = {"latent_image": "guide", "denoise": "guide.1"} | options
        b.add(f"{name} latent", "KSampler", model=model, positive="prior.2", negative="prior.2", **given)
        b.add(name, "VAEDecode", samples=f"{name} latent", vae="prior.1", saved=True)

    paint("unguided", "prior")
    for k in range(3):
        paint(f"own_{k}", "prior", denoise=1.0, seed=SEED + k)
    for k, strength in enumerate(STRENGTHS):
        b.add(f"model_{k}", "DCDD_DistributionGuidance", model="prior", vae="prior.1", strength=strength, **tokens)
        paint(f"guided_{k}", f"model_{k}")
        add_agreement(b, f"guided_{k}", **tokens)
    for k, start in enumerate(STARTS):
        b.add(f"guide_{k}", "DCDD_TokenGuideLatent", vae="prior.1", start=start, **tokens)
        paint(f"started_{k}", "model_1", latent_image=f"guide_{k}", denoise=f"guide_{k}.1")
    b.add("sharpened", "DCDD_SharpenToTokens", vae="prior.1", saved=True, **tokens)


def add_agreement(b: Building, image: str, **tokens: str) -> None:
    b.add(f"{image} agreement", "DCDD_TokenAgreement", image=image, **tokens)
    b.add(f"{image} differs", "MaskToImage", mask=f"{image} agreement.2", saved=True)


def second_graph() -> Graph:
    """Load Calibration, and the effect of the calibration on one image."""
    b = Building()
    b.add("vq", "DCDD_LoadVQVAE")
    b.add("scene", "DCDD_PicoScene")
    b.add("encoded", "DCDD_VQVAEEncode", vq_vae="vq", image="scene")
    b.add("loaded", "DCDD_LoadCalibration", file=f"{CALIBRATION}.safetensors")
    b.add("calibrated", "DCDD_LogitCalibrator", token_logits="encoded", vq_vae="vq", calibration="loaded")
    b.add("calibrated_soft", "DCDD_VQVAEDecode", token_logits="calibrated", vq_vae="vq", codes=SOFT, saved=True)
    return b.graph


# --- running it -------------------------------------------------------------------------------------------------------


@contextmanager
def comfyui(folder: Path, pack: Path) -> Iterator[str]:
    """Starts ComfyUI on the CPU in a temporary folder, yields its URL, and stops it at the end."""
    with tempfile.TemporaryDirectory(prefix="dcdd_images_") as temporary:
        base = Path(temporary)
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir()
        (base / "custom_nodes" / "ComfyUI-DCDD").symlink_to(pack, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(folder / "main.py"), "--cpu", "--base-directory", str(base)]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:"]  # by default it is in ComfyUI's own folder
        command += ["--preview-method", "auto"]  # by default there are none
        log = base / "comfyui.log"
        with log.open("wb") as file:
            server = subprocess.Popen(command, cwd=base, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield f"http://127.0.0.1:{port}"
        except BaseException:
            print(log.read_text("utf-8", errors="replace")[-6000:], file=sys.stderr)
            raise
        finally:
            server.terminate()
            server.wait(30)


async def collect(address: str, results: Path) -> None:
    """Runs the graphs, and writes images NAME.K.png, previews NODE.preview_K.jpg and texts.json into `results`."""
    async with aiohttp.ClientSession(address) as session:
        await _wait_for(session)
        texts: dict[str, str] = {}
        for graph in (first_graph(), second_graph()):
            for name, output in (await _run(session, graph, results)).items():
                if "text" in output:
                    texts[name] = output["text"][0]
                for k, image in enumerate(output.get("images", [])):
                    async with session.get("/view", params=image) as answer:
                        (results / f"{name.removesuffix(' saved')}.{k}.png").write_bytes(await answer.read())
        (results / "texts.json").write_text(json.dumps(texts, indent=1), "utf-8")


async def _wait_for(session: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with session.get("/system_stats") as answer:
                if answer.ok:
                    return
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(1)
    raise TimeoutError("ComfyUI did not answer within ten minutes")


async def _run(session: aiohttp.ClientSession, graph: Graph, results: Path) -> dict[str, Any]:
    """Runs a graph and saves its previews. Returns each node's outputs, or else the text that the node displayed."""
    client, counts, displayed = uuid.uuid4().hex, dict.fromkeys(graph, 0), {}
    async with session.ws_connect("/ws", params={"clientId": client}, max_msg_size=0) as events:
        # Asks for previews with the id of their node.
        await events.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        async with session.post("/prompt", json={"prompt": graph, "client_id": client}) as answer:
            queued = await answer.json()
            if "prompt_id" not in queued:
                raise RuntimeError(f"ComfyUI refused the graph: {json.dumps(queued)}")
        async for message in events:
            if message.type == aiohttp.WSMsgType.BINARY:
                kind, size = struct.unpack(">II", message.data[:8])
                if kind == 4:  # a preview, after JSON with the id of its node
                    name = json.loads(message.data[8 : 8 + size])["node_id"]
                    (results / f"{name}.preview_{counts[name]:03d}.jpg").write_bytes(message.data[8 + size :])
                    counts[name] += 1
                elif kind == 3:  # a text on a node, after the node's id
                    displayed[message.data[8 : 8 + size].decode()] = message.data[8 + size :].decode()
                continue
            event = json.loads(message.data)
            if event["type"] == "execution_error":
                raise RuntimeError(f"{event['data']['node_id']}: {event['data']['exception_message']}")
            if event["type"] == "executing" and event["data"]["node"] is None:
                break  # the history has the outputs from now on
    async with session.get(f"/history/{queued['prompt_id']}") as answer:
        outputs = (await answer.json())[queued["prompt_id"]]["outputs"]
    return {name: {"text": [displayed[name]]} if name in displayed else {} for name in graph} | outputs


# --- drawing ----------------------------------------------------------------------------------------------------------

#: In pixels. The help panel is 275 pixels wide at first, so that text appears at about half this size.
WIDTH, GAP, TEXT, SMALL = 520, 14, 21, 19
PAPER, INK, FAINT = (250, 249, 246), (24, 24, 28), (104, 104, 112)
NODE, NODE_TITLE, NODE_INK, LINE = (53, 53, 58), (36, 36, 40), (226, 226, 230), (190, 190, 196)
ACCENT = (214, 92, 40)
CURVES = ((31, 119, 180), (255, 127, 14), (44, 160, 44))  # the first three of matplotlib's default colours


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def blank(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def wrapped(text: str, size: int, width: int) -> list[str]:
    """Splits a text into lines of at most `width` pixels."""
    lines, measure = [""], font(size)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def tiles(*rows: Sequence[tuple[str, Image.Image]], size: int = TEXT) -> Image.Image:
    """Images in rows, of equal width within a row, each with its label below."""
    strips = []
    for row in rows:
        side, line = (WIDTH - GAP * (len(row) + 1)) // len(row), round(size * 1.25)
        labels = [wrapped(label, size, side) if label else [] for label, _ in row]
        strip, pen = blank(side + 6 + line * max(map(len, labels)))
        for k, (_, image) in enumerate(row):
            left = GAP + k * (side + GAP)
            strip.paste(enlarged(image, side), (left, 0))
            for n, text in enumerate(labels[k]):
                pen.text((left, side + 4 + n * line), text, fill=INK, font=font(size))
        strips.append(strip)
    return stacked(*strips)


def stacked(*strips: Image.Image) -> Image.Image:
    """Images from top to bottom, scaled to one width, with gaps between them."""
    fitted = [s if s.width == WIDTH else s.resize((WIDTH, round(s.height * WIDTH / s.width))) for s in strips]
    sheet, _ = blank(sum(s.height for s in fitted) + GAP * (len(fitted) + 1))
    top = GAP
    for strip in fitted:
        sheet.paste(strip, (0, top))
        top += strip.height + GAP
    return sheet


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """Enlarges without smoothing, so that a small image is recognisable as one."""
    whole = image.convert("RGB")
    times = max(1, -(-side // whole.width))
    blocks = whole.resize((whole.width * times, whole.height * times), Image.Resampling.NEAREST)
    return blocks.resize((side, side), Image.Resampling.LANCZOS)


def gridded(image: Image.Image) -> Image.Image:
    """The image with its token grid drawn over it."""
    large = enlarged(image, 48 * TOKENS_A_SIDE)
    pen = ImageDraw.Draw(large)
    for k in range(48, large.width, 48):
        pen.line([(k, 0), (k, large.height)], fill=PAPER, width=3)
        pen.line([(0, k), (large.width, k)], fill=PAPER, width=3)
    return large


def outlined(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image, darkened where the mask is black, with a line along the mask's edge."""
    large, area = enlarged(image, 480), mask.convert("L").resize((480, 480), Image.Resampling.NEAREST)
    area = area.point(lambda value: 255 if value > 127 else 0)
    dimmed = Image.blend(large, Image.new("RGB", large.size, INK), 0.55)
    edge = ImageChops.difference(area.filter(ImageFilter.MaxFilter(5)), area.filter(ImageFilter.MinFilter(5)))
    return Image.composite(Image.new("RGB", large.size, ACCENT), Image.composite(large, dimmed, area), edge)


def scale() -> Image.Image:
    """The colour scale of the heat maps, from 0 at the bottom to 1 at the top."""
    sheet = Image.new("RGB", (256, 256), PAPER)
    for k in range(256):
        colour = tuple(round(255 * c) for c in matplotlib.colormaps["inferno"](k / 255)[:3])
        sheet.paste(colour, (0, 255 - k, 64, 256 - k))
    pen = ImageDraw.Draw(sheet)
    for text, y, anchor in (("1  uncertain", 2, "la"), ("0  certain", 254, "ld")):
        pen.text((80, y), text, fill=INK, font=font(24), anchor=anchor)
    return sheet


def curve_of(sheet: Image.Image) -> Image.Image:
    """The plot of a Logit Statistics image: the part to the right of the widest gap near its middle."""
    ink = ImageOps.invert(sheet.convert("L")).point(lambda value: 255 if value > 8 else 0)
    gaps, start = [(0, 0)], None
    for x in range(round(0.2 * ink.width), round(0.8 * ink.width)):
        if ink.crop((x, 0, x + 1, ink.height)).getbbox() is not None:
            start = None
        else:
            start = x if start is None else start
            gaps.append((x - start, (x + start) // 2))
    right = sheet.crop((max(gaps)[1], 0, *sheet.size))
    return ImageOps.expand(right.crop(ImageOps.invert(right.convert("L")).getbbox()), 16, "white")


def pass_of(sheet: Image.Image, number: int) -> tuple[Image.Image, Image.Image]:
    """One pass, 1.., of a contact sheet of passes: the image after it, and the same with what changed in colour."""
    left = 12 + (number - 1) * 172
    after, marked = (sheet.crop((left, top, left + 160, top + 160)) for top in (66, 264))
    return after, marked


def legend(*names: str) -> Image.Image:
    """The names of the curves, larger than the node draws them."""
    strip, pen = blank(28)
    left = GAP
    for name, colour in zip(names, CURVES):
        pen.ellipse([left, 5, left + 18, 23], fill=colour)
        pen.text((left + 26, 14), name, fill=INK, font=font(TEXT), anchor="lm")
        left += round(font(TEXT).getlength(name)) + 56
    return strip


def table_of(text: str) -> Image.Image:
    """Draws the text table of Logit Statistics, larger than the node does."""
    head, *rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    sheet, pen = blank(34 * (len(rows) + 1))
    for r, cells in enumerate([["", *head], *rows]):
        pen.line([(GAP, 34 * r + 33), (WIDTH - GAP, 34 * r + 33)], fill=LINE)
        for c, cell in enumerate(cells):
            x = WIDTH - GAP - 108 * (len(cells) - 1 - c) if c else GAP
            pen.text((x, 34 * r + 17), cell, fill=INK, font=font(SMALL), anchor="rm" if c else "lm")
    return sheet


class Diagram:
    """Shows from top to bottom: files or steps, the node, and the nodes that its outputs connect to."""

    NODE_WIDTH = 266

    def __init__(self) -> None:
        self._strips: list[Image.Image] = []

    def files(self, root: str, *entries: tuple[str, str]) -> Diagram:
        """A folder and its (path, description) entries."""
        sheet, pen = blank(42 + 60 * len(entries))
        pen.rounded_rectangle([GAP, 4, GAP + 18, 16], 4, fill=(224, 178, 84))
        pen.rounded_rectangle([GAP, 9, GAP + 38, 34], 5, fill=(238, 196, 104))
        pen.text((GAP + 48, 8), root, fill=INK, font=font(TEXT))
        for k, (path, what) in enumerate(entries):
            top = 46 + 60 * k
            pen.line([(GAP + 16, top - 8), (GAP + 16, top + 14), (GAP + 34, top + 14)], fill=LINE, width=3)
            pen.text((GAP + 42, top), path, fill=INK, font=font(TEXT))
            pen.text((GAP + 42, top + 26), what, fill=FAINT, font=font(SMALL))
        self._strips.append(sheet)
        return self

    def steps(self, *lines: str) -> Diagram:
        """Numbered instructions."""
        rows = [wrapped(line, TEXT, WIDTH - 2 * GAP - 46) for line in lines]
        sheet, pen = blank(sum(max(34, 27 * len(row)) + 12 for row in rows))
        top = 0
        for k, row in enumerate(rows, start=1):
            pen.ellipse([GAP, top, GAP + 32, top + 32], fill=ACCENT)
            pen.text((GAP + 16, top + 16), str(k), fill=PAPER, font=font(TEXT), anchor="mm")
            for n, text in enumerate(row):
                pen.text((GAP + 46, top + 3 + 27 * n), text, fill=INK, font=font(TEXT))
            top += max(34, 27 * len(row)) + 12
        self._strips.append(sheet)
        return self

    def arrow(self, label: str = "") -> Diagram:
        sheet, pen = blank(40)
        middle = self.NODE_WIDTH // 2
        pen.line([(middle, 0), (middle, 26)], fill=ACCENT, width=5)
        pen.polygon([(middle - 12, 20), (middle + 12, 20), (middle, 39)], fill=ACCENT)
        pen.text((middle + 24, 18), label, fill=FAINT, font=font(SMALL), anchor="lm")
        self._strips.append(sheet)
        return self

    def node(self, title: str, *rows: str, outputs: Sequence[tuple[str, tuple[str, ...]]] = ()) -> Diagram:
        """A node with its widgets, and its outputs, each with the nodes that it connects to."""
        lines = len(rows) + sum(max(1, len(nodes)) for _, nodes in outputs)
        sheet, pen = blank(52 + 36 * lines)
        right = self.NODE_WIDTH if outputs else WIDTH - GAP
        pen.rounded_rectangle([GAP, 0, right, sheet.height - 1], 12, fill=NODE)
        pen.rounded_rectangle([GAP, 0, right, 40], 12, fill=NODE_TITLE)
        size = TEXT if font(TEXT).getlength(title) <= right - 2 * GAP - 14 else SMALL
        pen.text((GAP + 14, 20), title, fill=NODE_INK, font=font(size), anchor="lm")
        top = 62
        for text in rows:
            pen.text((GAP + 14, top), text, fill=NODE_INK, font=font(SMALL), anchor="lm")
            top += 36
        for name, nodes in outputs:
            pen.text((right - 20, top), name, fill=NODE_INK, font=font(SMALL), anchor="rm")
            pen.ellipse([right - 9, top - 9, right + 9, top + 9], fill=ACCENT)
            for k, to in enumerate(nodes):
                pen.line([(right, top), (right + 20, top + 36 * k), (right + 34, top + 36 * k)], ACCENT, 4)
                pen.text((right + 42, top + 36 * k), to, fill=INK, font=font(TEXT), anchor="lm")
            top += 36 * max(1, len(nodes))
        self._strips.append(sheet)
        return self

    def drawn(self) -> Image.Image:
        return stacked(*self._strips)


# --- the images -------------------------------------------------------------------------------------------------------

_JANUS_FILES = ("config.json, tokenizer.json", "architecture and vocabulary")
_MODEL = "model:  Janus-Pro-1B"


def diagrams(saved: str) -> Iterator[tuple[str, Image.Image]]:
    """(node id, image) for the nodes that handle files; `saved` is the text that Save Calibration displayed."""
    d = Diagram().steps(
        "Choose a model: the list says how large it is.",
        "FLUX.1-Fill-dev only: accept its licence on its page, and log in (hf auth login, or HF_TOKEN).",
        "Press Run. An interrupted download continues where it stopped.",
    )
    d.node("Download Model", "Janus-Pro-1B (4.2 GB)", outputs=[("path", ("its folder",))]).arrow("then press R")
    yield "DCDD_DownloadModel", d.node("Load Janus", _MODEL, outputs=[("janus", ()), ("vq_vae", ())]).drawn()

    vq = ("vq_vae", ("LCDM Encoder", "VQ-VAE Decode", "VQ-VAE Encode"))
    d = Diagram().files("models/janus/Janus-Pro-1B", _JANUS_FILES, ("the weights", "language model and VQ-VAE"))
    d.arrow().node("Load Janus", _MODEL, outputs=[("janus", ("Janus Logit Sampler",)), vq])
    yield "DCDD_LoadJanus", d.drawn()

    d = Diagram().files("models/janus/Janus-Pro-1B", _JANUS_FILES, ("the weights", "only the VQ-VAE is loaded"))
    yield "DCDD_LoadVQVAE", d.arrow().node("Load VQ-VAE", _MODEL, outputs=[vq]).drawn()

    d = Diagram().files(
        "ComfyUI/models",
        ("dcdd/my decoder.safetensors", "bundle: the weights that training changed"),
        ("diffusion_models/flux1-fill-dev.safetensors", "base_model: the FLUX.1-Fill of the training"),
        ("vae/ae.safetensors", "vae: the FLUX autoencoder"),
    )
    to = ("FLUX Decoder", "LCDM Encoder", "Logit Calibrator")
    yield "DCDD_LoadDecoder", d.arrow().node("Load DCDD Decoder", outputs=[("decoder", to)]).drawn()

    file, _, numbers = saved.removeprefix("saved ").partition(": ")
    d = Diagram().node("Logit Calibrator", outputs=[("calibration", ())]).arrow()
    d.node("Save Calibration", f"name:  {CALIBRATION}", numbers).arrow()
    another = (f"{CALIBRATION}_2.safetensors", "the next file gets a number")
    d.files("models/dcdd/calibrations", (file, "an earlier file is never overwritten:"), another)
    yield "DCDD_SaveCalibration", d.drawn()

    d = Diagram().files("models/dcdd/calibrations", (file, "a few numbers")).arrow("press R after adding one")
    d.node("Load Calibration", f"file:  {CALIBRATION}", outputs=[("calibration", ("Logit Calibrator",))])
    yield "DCDD_LoadCalibration", d.drawn()


def drawings(results: Path) -> Iterator[tuple[str, Image.Image]]:
    """(node id, image) for every node."""

    def result(name: str, k: int = 0) -> Image.Image:
        return Image.open(results / f"{name}.{k}.png").convert("RGB")

    texts = json.loads((results / "texts.json").read_text("utf-8"))
    yield from diagrams(texts["kept"])

    grown = [Image.open(path).convert("RGB") for path in sorted(results.glob("sampled.preview_*.jpg"))]
    stages = [(f"{share}%", grown[len(grown) * share // 100 - 1]) for share in (25, 50, 75, 100)]
    yield "DCDD_JanusLogitSampler", tiles(stages[:2], stages[2:])
    passes = {k: pass_of(result("passes"), k) for k in (2, 5, 8, 11)}
    after, marked = ([image[row] for image in passes.values()] for row in (0, 1))
    labels = [f"pass {k}" for k in passes]
    yield "DCDD_ProgressiveTokenSampler", tiles(list(zip(labels, after)), [("", image) for image in marked])

    original = ("the image", result("scene"))
    tokens = (f"{TOKENS_A_SIDE} x {TOKENS_A_SIDE} tokens", gridded(result("scene")))
    yield "DCDD_VQVAEEncode", tiles([original, tokens, ("decoded again", result("again"))], size=SMALL)

    curve = curve_of(result("statistics"))
    yield "DCDD_LogitStatistics", stacked(table_of(texts["table"]), legend("Janus", "before", "after"), curve)
    soft = [original, ("soft decode before", result("raw_soft")), ("and after", result("calibrated_soft"))]
    names = legend("Janus", "before calibration", "after")
    yield "DCDD_LogitCalibrator", stacked(names, curve, tiles(soft, size=SMALL))

    by_vq = result("by_vq")
    yield (
        "DCDD_LCDMEncoder",
        tiles(
            [("the tokens, decoded", by_vq), ("", scale())],
            [("doubt", result("heat_0")), ("narrow choice", result("heat_1"))],
            [("spread", result("heat_2")), ("tail entropy", result("heat_3"))],
        ),
    )
    yield (
        "DCDD_UncertaintyMask",
        tiles(
            [("the image", by_vq), ("heat_map", result("heat_0"))],
            [("hard", result("hard_mask")), ("soft, grow 1, blur 0.7", result("soft_mask"))],
        ),
    )
    yield "DCDD_VQVAEDecode", tiles([(HARD, by_vq), (SOFT, result("by_vq_soft"))], size=SMALL)
    yield (
        "DCDD_FluxDecoder",
        tiles(
            [("VQ-VAE Decode", by_vq), ("this node", result("painted"))],
            [("image and mask", outlined(by_vq, result("hard_mask"))), ("painted under the mask", result("repainted"))],
        ),
    )
    yield from guidance_drawings(result, texts)
    captions = texts["captions"].splitlines()
    yield "DCDD_PicoScene", tiles([(captions[k], result("scenes", k)) for k in (0, 1)], size=SMALL)
    yield "DCDD_CompareDecoders", stacked(result("compared"))


def guidance_drawings(
    result: Callable[[str], Image.Image], texts: Mapping[str, str]
) -> Iterator[tuple[str, Image.Image]]:
    """(node id, image) for the nodes of distribution guidance."""
    by_vq = ("VQ-VAE Decode", result("ring_vq"))
    strengths = [(f"strength {strength:g}", result(f"guided_{k}")) for k, strength in enumerate(STRENGTHS)]
    yield (
        "DCDD_DistributionGuidance",
        tiles(
            [by_vq, ("KSampler, not guided", result("unguided"))],
            [("KSampler, guided", result("guided_1")), ("trained decoder", result("trained"))],
            strengths,
            size=SMALL,
        ),
    )
    starts = [(f"start {start:g}", result(f"started_{k}")) for k, start in enumerate(STARTS)]
    yield "DCDD_TokenGuideLatent", tiles([by_vq, ("this node", result("guide"))], starts, size=SMALL)
    soft = ("VQ-VAE Decode, soft", result("ring_soft"))
    yield "DCDD_SharpenToTokens", tiles([soft, ("this node", result("sharpened"))], size=SMALL)
    checked = {"VQ-VAE Decode": "ring_vq", "guided": "guided_1", f"strength {STRENGTHS[2]:g}": "guided_2"}
    masks = [(shares(texts[f"{name} agreement"]), result(f"{name} differs")) for name in checked.values()]
    yield "DCDD_TokenAgreement", tiles([(label, result(name)) for label, name in checked.items()], masks, size=SMALL)
    own = [("", result(f"own_{k}")) for k in range(3)]
    outputs = [
        ("model", ("Distribution Guidance",)),
        ("vae", ("Token Guide Latent", "VAE Decode")),
        ("conditioning", ("KSampler",)),
    ]
    yield (
        "DCDD_LoadPicoModel",
        stacked(tiles(own), Diagram().node("Load Pico Diffusion Model", outputs=outputs).drawn()),
    )


def shares(told: str) -> str:
    """The text that Token Agreement shows, shortened."""
    return "{}%, under noise {}%".format(*re.findall(r"(\d+)%", told))


def write(image: Image.Image, path: Path) -> None:
    """Saves a JPEG at the highest quality that keeps it within MOST_BYTES."""
    for quality in range(90, 40, -5):
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality, optimize=True, subsampling=0)
        if data.tell() <= MOST_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())
    print(f"{path.name}: {image.width} x {image.height}, {data.tell() / 1000:.0f} kB at quality {quality}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_DIR"), help="default: COMFYUI_DIR")
    parser.add_argument("--pack", type=Path, default=ROOT, help="the copy of the pack to run; default: this one")
    parser.add_argument("--results", type=Path, help="folder for the raw results; they are reused if present")
    parser.add_argument("--out", type=Path, default=ROOT / "web" / "docs" / "images")
    parser.add_argument("--only", default="", help="only images of nodes with this text in their ids")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dcdd_results_") as temporary:
        results = given.results or Path(temporary)
        if not (results / "texts.json").is_file():
            if given.comfyui is None:
                parser.error("ComfyUI's folder is unknown: give --comfyui, or set COMFYUI_DIR")
            results.mkdir(parents=True, exist_ok=True)
            with comfyui(Path(given.comfyui).expanduser().resolve(), given.pack.resolve()) as address:
                asyncio.run(collect(address, results))
        for name, image in drawings(results):
            if given.only.lower() in name.lower():
                write(image, given.out / f"{name}.jpg")


if __name__ == "__main__":
    main()
