"""Text to image: pictures of a list of prompts by both decoders, and GenEval's folders of them (the paper's Table 3).

GenEval's own scorer (github.com/djghosh13/geneval, `evaluation/evaluate_images.py`) reads, for each prompt,
`<folder>/<00000>/metadata.jsonl` and every picture in `samples/`; `grid.png` is for people. One such tree is written
for each path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files import write_text
from ..pipelines.distributed import Processes
from ..types import TokenLogits
from .decoding import Decoders, seed_of
from .figures import save_image, text_of, to_image
from .image_folder import Picture, open_picture
from .prompts import Prompt

#: Pictures of each GenEval prompt.
SAMPLES = 4
_METADATA = "metadata.jsonl"

#: Prompts and a seed for each -> tokens and logits.
Sample = Callable[[Sequence[str], Sequence[int]], TokenLogits]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sample to draw and both pictures to write.

    Attributes:
        text: the prompt.
        name: of the sample, which its seed follows from.
        files: path ("vq", "dcdd") -> PNG file.
    """

    text: str
    name: str
    files: Mapping[str, Path]


def prompt_jobs(prompts: Sequence[Prompt], folder: Path, paths: Sequence[str]) -> list[Job]:
    """One picture a prompt and path, in MJHQ-30K's layout: "<folder>/<path>/<category>/<name>.png"."""
    return [
        Job(
            text=prompt.text,
            name=f"{prompt.category}/{prompt.name}",
            files={path: folder / path / prompt.category / f"{prompt.name}.png" for path in paths},
        )
        for prompt in prompts
    ]


def geneval_jobs(prompts: Sequence[Prompt], folder: Path, paths: Sequence[str]) -> list[Job]:
    """Four pictures a prompt and path, in GenEval's layout: "<folder>/<path>/<00000>/samples/<0000>.png"."""
    return [
        Job(
            text=prompt.text,
            name=f"geneval/{prompt.name}/{k:04}",
            files={path: folder / path / prompt.name / "samples" / f"{k:04}.png" for path in paths},
        )
        for prompt in prompts
        for k in range(SAMPLES)
    ]


def generate_all(
    jobs: Sequence[Job], sample: Sample, decoders: Decoders, processes: Processes, *, seed: int, batch: int, label: str
) -> None:
    """Writes every picture that is not there yet, or is of another text."""
    for part in processes.batches(jobs, batch, done=_is_made, label=label):
        seeds = [seed_of(seed, job.name) for job in part]
        painted = decoders.paint(sample([job.text for job in part], seeds), seeds)
        for i, job in enumerate(part):
            for path, file in job.files.items():
                if text_of(file) != job.text:
                    save_image(to_image(painted[path][i]), file, text=job.text)


def made_pictures(prompts: Sequence[Prompt], folder: Path, path: str, *, by_category: bool) -> list[Picture]:
    """The pictures of `prompt_jobs` on one path."""
    return [
        Picture.at(job.files[path], folder / path, prompt.category if by_category else "")
        for prompt, job in zip(prompts, prompt_jobs(prompts, folder, [path]))
    ]


def finish_geneval(prompts: Sequence[Prompt], folder: Path, paths: Sequence[str], processes: Processes) -> None:
    """Writes each prompt's metadata and, of its four pictures, the grid, where they are not there or of another."""
    homes = [(prompt, folder / path / prompt.name) for path in paths for prompt in prompts]
    for part in processes.batches(homes, 1, done=_is_finished, label="GenEval grids"):
        for prompt, home in part:
            write_text(home / _METADATA, prompt.metadata + "\n")
            pictures = [open_picture(home / "samples" / f"{k:04}.png") for k in range(SAMPLES)]
            width, height = pictures[0].size
            grid = Image.new("RGB", (2 * width, 2 * height))
            for k, picture in enumerate(pictures):
                grid.paste(picture, (k % 2 * width, k // 2 * height))
            save_image(grid, home / "grid.png", text=prompt.text)


def _is_made(job: Job) -> bool:
    return all(text_of(file) == job.text for file in job.files.values())


def _is_finished(home: tuple[Prompt, Path]) -> bool:
    prompt, folder = home
    told, grid = folder / _METADATA, folder / "grid.png"
    return told.is_file() and told.read_text("utf-8") == prompt.metadata + "\n" and text_of(grid) == prompt.text
