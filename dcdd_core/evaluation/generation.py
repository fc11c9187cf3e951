"""Text to image: generates images for a list of prompts with both decoders, also in GenEval's folder layout (Table 3).

GenEval's scorer (github.com/djghosh13/geneval, `evaluation/evaluate_images.py`) reads `<folder>/<00000>/metadata.jsonl`
and the images in `<folder>/<00000>/samples/` for each prompt; `grid.png` is for viewing. There is one such folder for
each decoder path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files import write_text
from ..pipelines.distributed import Processes
from ..pipelines.sample import Sample
from .decoding import Decoders, seed_of
from .figures import save_image, text_of, to_image
from .image_folder import ImageFile, open_image
from .prompts import Prompt

#: Name of the folder of GenEval's folders in an evaluation's.
GENEVAL = "geneval"
#: Images per GenEval prompt.
SAMPLES = 4
_METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sample to draw, and the images to write from it.

    Attributes:
        text: the prompt.
        name: of the sample; its seed is derived from it.
        files: decoder path ("vq", "dcdd") -> PNG file.
    """

    text: str
    name: str
    files: Mapping[str, Path]


def prompt_jobs(prompts: Sequence[Prompt], folder: Path, paths: Sequence[str]) -> list[Job]:
    """One image per prompt and decoder path, in MJHQ-30K's layout: "<folder>/<path>/<category>/<name>.png"."""
    return [
        Job(
            text=prompt.text,
            name=f"{prompt.category}/{prompt.name}",
            files={path: folder / path / prompt.category / f"{prompt.name}.png" for path in paths},
        )
        for prompt in prompts
    ]


def geneval_jobs(prompts: Sequence[Prompt], folder: Path, paths: Sequence[str]) -> list[Job]:
    """Four images per prompt and decoder path, in GenEval's layout: "<folder>/<path>/<00000>/samples/<0000>.png"."""
    return [
        Job(
            text=prompt.text,
            name=f"geneval/{prompt.name}/{k:04}",
            files={path: folder / path / prompt.name / "samples" / f"{k:04}.png" for path in paths},
        )
        for prompt in prompts
        for k in range(SAMPLES)
    ]


def check_geneval(prompts: Sequence[Prompt], folder: Path, paths: Sequence[str]) -> None:
    """Refuses folders of other prompts, which GenEval's scorer would count too.

    Raises:
        ValueError: naming them.
    """
    own = {prompt.name for prompt in prompts}
    homes = [home for path in paths if (folder / path).is_dir() for home in sorted((folder / path).iterdir())]
    if others := [home for home in homes if home.is_dir() and home.name.isdigit() and home.name not in own]:
        raise ValueError(
            f"{folder} has {len(others)} folders of other prompts, such as {others[0].relative_to(folder)}, which "
            "GenEval's scorer would count too: move them away, or give another --out"
        )


def generate_all(
    jobs: Sequence[Job], sample: Sample, decoders: Decoders, processes: Processes, *, seed: int, batch: int, label: str
) -> None:
    """Writes all images that are missing or were generated from another prompt."""
    for part in processes.batches(jobs, batch, done=_is_made, label=label):
        seeds = [seed_of(seed, job.name) for job in part]
        painted = decoders.paint(sample([job.text for job in part], seeds), seeds)
        for i, job in enumerate(part):
            for path, file in job.files.items():
                if text_of(file) != job.text:
                    save_image(to_image(painted[path][i]), file, text=job.text)


def generated_images(prompts: Sequence[Prompt], folder: Path, path: str, *, by_category: bool) -> list[ImageFile]:
    """The images that `prompt_jobs` lists for one decoder path."""
    return [
        ImageFile.at(job.files[path], folder / path, prompt.category if by_category else "")
        for prompt, job in zip(prompts, prompt_jobs(prompts, folder, [path]))
    ]


def finish_geneval(prompts: Sequence[Prompt], folder: Path, paths: Sequence[str], processes: Processes) -> None:
    """Writes each prompt's metadata and the grid of its four images, if missing or of another prompt."""
    homes = [(prompt, folder / path / prompt.name) for path in paths for prompt in prompts]
    for part in processes.batches(homes, 1, done=_is_finished, label="GenEval grids"):
        for prompt, home in part:
            write_text(home / _METADATA, prompt.metadata + "\n")
            images = [open_image(home / "samples" / f"{k:04}.png") for k in range(SAMPLES)]
            width, height = images[0].size
            grid = Image.new("RGB", (2 * width, 2 * height))
            for k, image in enumerate(images):
                grid.paste(image, (k % 2 * width, k // 2 * height))
            save_image(grid, home / "grid.png", text=prompt.text)


def _is_made(job: Job) -> bool:
    return all(text_of(file) == job.text for file in job.files.values())


def _is_finished(home: tuple[Prompt, Path]) -> bool:
    prompt, folder = home
    told, grid = folder / _METADATA, folder / "grid.png"
    content = (prompt.metadata + "\n").encode()
    return told.is_file() and told.read_bytes() == content and text_of(grid) == prompt.text
