"""Results as JSON, Markdown and plots."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dcdd_core.evaluation.figures import grouped_bars, histograms
from dcdd_core.evaluation.frechet import FrechetStatistics
from dcdd_core.evaluation.image_folder import ImageFile
from dcdd_core.evaluation.report import markdown, results_of, write_report

HEADS = {"frechet": "rFID", "psnr": "PSNR"}


def made(scopes, folder, **options):
    names = [name for name in scopes if name != "overall"] or [""]
    images = [ImageFile(path=folder, name=f"{i}", category=names[i % len(names)]) for i in range(4)]
    real = {name: FrechetStatistics.of([torch.rand(2, 3)]) for name in names}
    told = {"settings": {"steps": 3}, "networks": {"frechet": "I"}, "size": 9, "painted": {"VQ": 6, "DCDD": 9}}
    results = results_of(scopes, images=images, real=real, exact={"VQ": 0}, **told)
    return results, write_report(folder, results, title="T", heads=HEADS, command="dcdd x", **options)


def test_a_report_without_categories(tmp_path):
    scopes = {"overall": {"VQ": {"frechet": 2.8511, "psnr": 92.5}, "DCDD": {"frechet": 0.7535, "psnr": 20.0}}}
    results, text = made(scopes, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["scopes"] == scopes
    assert "|  | rFID ↓ | PSNR ↑ |\n|---|---|---|\n| VQ | 2.8511 | 92.5 |\n| DCDD | 0.7535 | 20 |" in text
    assert "- rFID: I" in text and "`dcdd x`" in text and "4 images against 2 references, measured at 9 x 9" in text
    assert "Resized to that size (bicubic, antialiased): VQ (6 pixels)." in text
    assert "by category" not in text and not (tmp_path / "scores.png").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"distribution_guidance": 0.05, "shift": 1.5}, "distribution guidance of strength 0.05 at shift 1.5."),
        ({"distribution_guidance": 0.05, "shift": None}, "distribution guidance of strength 0.05."),
        ({"shift": 1.5}, None),
    ],
)
def test_a_report_says_with_which_guidance_the_images_were_made(tmp_path, settings, said):
    results, _ = made({"overall": {"VQ": {"frechet": 1.0}}}, tmp_path)
    text = markdown({**results, "settings": settings}, title="T", heads=HEADS, command="dcdd x")
    assert (f"\n\nDCDD decode: {said}\n\n" in text) if said else ("guidance" not in text)


def test_a_report_says_how_many_images_are_exact(tmp_path):
    results, text = made({"overall": {"VQ": {"frechet": 1.0}, "DCDD": {"frechet": 2.0}}}, tmp_path)
    assert results["exact"] == {"VQ": 0} and "originals" not in text
    text = markdown({**results, "exact": {"VQ": 0, "DCDD": 3}}, title="T", heads=HEADS, command="dcdd x")
    assert "\n\nImages that equal their originals: DCDD (3 of 4). In the means, their PSNR counts as if" in text


def test_a_report_with_categories_and_single_scores(tmp_path):
    values = {"VQ": {"frechet": 1.0, "psnr": 2.0}}
    scopes = {"overall": values, "art": values, "food": {"VQ": {"frechet": 3.5, "psnr": 4.0}}}
    results, text = made(scopes, tmp_path, singles={"psnr": {"VQ": torch.tensor([1.0, torch.inf])}})
    assert results["pictures"] == {"overall": 4, "art": 2, "food": 2} == {**results["references"]}
    assert "## rFID ↓ by category\n\n|  | Overall | Art | Food |\n|---|---|---|---|\n| VQ | 1 | 1 | 3.5 |" in text
    assert "| references | 4 | 2 | 2 |" in text
    assert (tmp_path / "report.md").read_text("utf-8") == text and Image.open(tmp_path / "scores.png").width > 200


def test_one_category_has_tables_too_and_the_report_shows_its_plots(tmp_path):
    values = {"VQ": {"frechet": 1.0, "psnr": 2.0}}
    results, text = made({"overall": values, "art": values}, tmp_path, singles={"psnr": {"VQ": torch.rand(4)}})
    assert "## PSNR ↑ by category\n\n|  | Overall | Art |\n|---|---|---|\n| VQ | 2 | 2 |\n" in text
    assert "\n## Counts\n\n|  | Overall | Art |\n|---|---|---|\n| images | 4 | 4 |\n| references | 2 | 2 |\n" in text
    assert text.endswith("\n\n![rFID](frechet.png)\n\n![Scores of individual images](scores.png)\n")
    assert Image.open(tmp_path / "frechet.png").width > 200
    assert (tmp_path / "results.json").read_text("utf-8") == json.dumps(results, indent=1) + "\n"


def test_counts_are_written_in_full(tmp_path):
    values = {"VQ": {"frechet": 123456.0, "psnr": 2.0}}
    results, _ = made({"overall": values, "art": values}, tmp_path)
    results["pictures"] = {"overall": 1234567, "art": 1234567}
    text = write_report(tmp_path, results, title="T", heads=HEADS, command="dcdd x")
    assert "| images | 1234567 | 1234567 |" in text and "| VQ | 1.2346e+05 | 2 |" in text


def test_a_report_of_numbers_that_json_cannot_hold_is_refused(tmp_path):
    results, _ = made({"overall": {"VQ": {"frechet": 1.0, "psnr": 2.0}}}, tmp_path)
    results["settings"] = {"guidance": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, results, title="T", heads=HEADS, command="dcdd x")


@pytest.mark.parametrize(
    "plot",
    [
        grouped_bars({"Overall": {"a": 1.0, "b": 2.0}, "Art": {"a": 3.0, "b": 1.0}}, title="rFID"),
        histograms({"SSIM": {"a": torch.rand(9)}, "PSNR": {"a": torch.full((9,), torch.inf)}}),
    ],
)
def test_plots_show_something(plot):
    assert len(np.unique(np.asarray(plot).reshape(-1, 3), axis=0)) > 3


def test_what_is_left_out_is_named_and_may_be_no_text(tmp_path):
    scopes = {"overall": {"VQ": {"frechet": 1.0}}}
    results, _ = made(scopes, tmp_path)
    assert "left out" not in markdown(results, title="", heads={"frechet": "FID"}, command="")
    results["left_out"] = {"unreadable": ["\udce4.png"], "small": ["b.png", "c.png"]}
    text = write_report(tmp_path, results, title="", heads={"frechet": "FID"}, command="dcdd \udcff")
    assert (
        r"1 images cannot be read and are left out: \udce4.png. 2 images are too small and are left out: b.png, c"
        in text
    )
    assert r"`dcdd \udcff`" in (tmp_path / "report.md").read_text("utf-8")
