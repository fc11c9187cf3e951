"""Scenes to try things on, statistics of logits, and images side by side."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from comfy_api.latest import io

from ..dcdd_core.evaluation.figures import labelled_grid, statistics_sheet
from ..dcdd_core.evaluation.tables import column_names, statistics_table
from ..dcdd_core.method.statistics import describe_logits
from ..dcdd_core.types import TokenLogits
from ..dcdd_pico.scenes import SPLIT_SIZE, render_scene, scene_pixels
from . import host
from .convert import from_pil, image_of, pixels_of, resized
from .sockets import CONNECT_LOGITS, TokenLogitsSocket, expect, schema

_ALL = ("a", "b", "c", "d")


class PicoScene(io.ComfyNode):
    """A seeded scene of the embedded world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PicoScene",
            "Pico Scene",
            category="inspect",
            description=(
                "Renders a scene of the small world that the pico models know, with a caption: an input for trying "
                "workflows without a file. These scenes were held out from training."
            ),
            search_aliases=["test image", "demo input", "sample image", "caption"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SPLIT_SIZE - 1,
                    control_after_generate=True,
                    tooltip="Which scene; each further scene of the batch adds 1.",
                ),
                io.Int.Input(
                    "size",
                    default=96,
                    min=32,
                    max=1024,
                    step=8,
                    tooltip="Side length in pixels. pico was trained at 96; other multiples of 8 work too.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Number of scenes."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The rendered scene."),
                io.String.Output(
                    "caption",
                    display_name="caption",
                    tooltip="What each scene shows, one line per scene; a prompt for pico.",
                ),
            ],
        )

    @classmethod
    def execute(cls, seed: int, size: int, batch_size: int) -> io.NodeOutput:
        progress, scenes = host.NodeProgress(batch_size), []
        for k in range(batch_size):
            scenes.append(render_scene("test", (seed + k) % SPLIT_SIZE, size=size))
            progress.step(k + 1, batch_size)
        pixels = torch.cat([scene_pixels(scene.image[None], torch.device("cpu")) for scene in scenes])
        return io.NodeOutput(image_of(pixels), "\n".join(scene.caption for scene in scenes))


class LogitStatistics(io.ComfyNode):
    """The paper's Table 1 and Figure 6 of the connected logits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        others = [
            TokenLogitsSocket.Input(f"token_logits_{x}", optional=True, tooltip="Another column.") for x in _ALL[1:]
        ]
        return schema(
            "LogitStatistics",
            "Logit Statistics",
            category="inspect",
            description=(
                "Shows how certain the model is: the statistics of the paper's Table 1 and the curve of its Figure "
                "6. Connect Janus' logits, an image's proxy logits and the calibrated ones to see what calibration "
                "does."
            ),
            search_aliases=["entropy", "confidence", "table", "histogram", "inspect logits"],
            inputs=[
                TokenLogitsSocket.Input("token_logits", tooltip="The first column."),
                *others,
                io.String.Input(
                    "names",
                    default="",
                    tooltip=(
                        "Names of the columns, separated by commas, in the order of the connected sockets. A "
                        "column without a name is called by what it holds: sampled, proxies or calibrated."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="Table and curve. Connect to Preview Image."),
                io.String.Output("table", display_name="table", tooltip="The table as text."),
            ],
        )

    @classmethod
    def execute(cls, token_logits: TokenLogits, names: str, **others: TokenLogits | None) -> io.NodeOutput:
        columns = [token_logits, *(others[key] for key in sorted(others) if others[key] is not None)]
        for value in columns:
            expect(value, TokenLogits, "token_logits", CONNECT_LOGITS)
        labels = column_names(columns, [name.strip() for name in names.split(",")])
        images = sum(len(value.tokens) for value in columns)
        steps, progress = count(1), host.NodeProgress(images)

        def each(value: TokenLogits) -> Iterator[TokenLogits]:
            for k in range(len(value.tokens)):
                yield value.part(k, k + 1)
                progress.step(next(steps), images)

        found = {label: describe_logits(each(value)) for label, value in zip(labels, columns)}
        return io.NodeOutput(from_pil(statistics_sheet(found)), statistics_table(found))


class CompareDecoders(io.ComfyNode):
    """Images side by side, labelled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for x, label in zip(_ALL, ("VQ-VAE decode", "DCDD decode", "", "")):
            inputs += [
                io.Image.Input(f"image_{x}", optional=x != "a", tooltip="One column; a batch gives one row per image."),
                io.String.Input(f"label_{x}", default=label, tooltip="Text above this column."),
            ]
        return schema(
            "CompareDecoders",
            "Compare Decoders",
            category="inspect",
            description="Arranges up to four images, or batches of images, side by side on one labelled sheet.",
            search_aliases=["side by side", "grid", "contact sheet", "concat images"],
            inputs=[
                *inputs,
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="One line of text below each row; rows without a line get none.",
                ),
                io.Int.Input(
                    "side", default=320, min=64, max=1024, tooltip="Height of each image on the sheet, in pixels."
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The sheet.")],
        )

    @classmethod
    def execute(cls, captions: str, side: int, **given) -> io.NodeOutput:
        used = [x for x in _ALL if given.get(f"image_{x}") is not None]
        columns = [pixels_of(given[f"image_{x}"]).cpu() for x in used]
        rows = max(map(len, columns))
        if any(len(column) not in (1, rows) for column in columns):
            raise ValueError(
                f"batches of {', '.join(str(len(column)) for column in columns)} images do not fit side by side: "
                "connect batches of the same size, or single images"
            )
        height, width = columns[0].shape[2:]
        columns = [resized(column, height, width).expand(rows, -1, -1, -1) for column in columns]
        lines = [*captions.splitlines()[:rows], *[""] * rows][:rows]
        labels = [given.get(f"label_{x}") or "" for x in used]
        sheet = labelled_grid(list(zip(*columns)), columns=labels, captions=lines, side=side)
        return io.NodeOutput(from_pil(sheet))


NODES = [PicoScene, LogitStatistics, CompareDecoders]
