"""What must not work ends with a sentence that an artist understands, and the server lives on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.comfy.graphs import Graph, Link, everything
from tests.comfy.snapshot import inputs

pytestmark = pytest.mark.comfy

#: Python's and torch's own words, which tell a user nothing.
UNCLEAR = re.compile(
    r"NoneType|has no attribute|unexpected keyword|positional argument|not subscriptable|shapes cannot be multiplied"
    r"|size of tensor|size mismatch|index out of range|Given groups|^Expecting |not supported between|must be Tensor"
    r"|Sizes of tensors|invalid literal|could not convert"
)
NAN = "nan"  # A JSON text: ComfyUI makes a number of it, and lets it through.


def refuse(server, graph: Graph, *words: str) -> None:
    """Runs the prompt, which has to fail with all of the words in what the user reads."""
    run = server.run(graph.prompt)
    assert run.status in ("error", "rejected"), f"it ended with {run.status}"
    assert run.error_type in ("", "ValueError", "RuntimeError"), f"{run.error_type}: {run.error}"
    assert not UNCLEAR.search(run.error), run.error
    for word in words:
        assert word.lower() in run.error.lower(), f"{word!r} is not in: {run.error}"
    assert server.get("/system_stats") and server.alive


@dataclass
class Parts:
    """A graph with pico's tokenizer and decoder, and two pictures of noise as tokens and as a condition."""

    graph: Graph
    vq: Link
    decoder: Link
    image: Link
    proxies: Link
    condition: Link

    def keep(self, kind: str, **values: Any) -> None:
        node, _ = self.graph.add("faulty", kind, **values)
        self.graph.add("end", "TEST_Hold", value=(node, 0))

    def encode(self, name: str, model: str, **picture: Any) -> tuple[Link, Link]:
        """Another picture in the tokens of another model: (its tokenizer, token logits)."""
        image = self.graph.add(f"{name}_image", "TEST_Picture", **{"fill": "noise", **picture})
        vq = self.graph.add(f"{name}_load", "DCDD_LoadVQVAE", model=model)
        return vq, self.graph.add(f"{name}_encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)

    def calibrated(self, proxies: Link) -> Link:
        of = {"vq_vae": self.vq, "decoder": self.decoder}
        return self.graph.add("calibrate", "DCDD_LogitCalibrator", token_logits=proxies, **of)

    def edit(self, token_logits: Link, **values: Any) -> None:
        janus = self.graph.add("janus", "DCDD_LoadJanus")
        self.keep("DCDD_JanusLogitSampler", janus=janus, token_logits=token_logits, **values)

    def paint(self, **values: Any) -> None:
        self.keep("DCDD_FluxDecoder", **{"decoder": self.decoder, "condition": self.condition, "steps": 1, **values})

    def mask(self, **values: Any) -> Link:
        return self.graph.add("mask", "TEST_Mask", **{"bottom": 48, "right": 48, "value": 1.0, **values})


@pytest.fixture
def parts(graph: Graph) -> Parts:
    vq = graph.add("load", "DCDD_LoadVQVAE")
    decoder = graph.add("load_decoder", "DCDD_LoadDecoder")
    image = graph.add("image", "TEST_Picture", fill="noise", batch=2)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=proxies, vq_vae=vq, decoder=decoder)
    return Parts(graph, vq, decoder, image, proxies, condition)


# --- numbers, words, choices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["guidance", "temperature", "top_p"])
def test_sampler_refuses_nan(name, server, graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    graph.keep(graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, **{name: NAN}), "nan")
    refuse(server, graph, name, "finite number")


@pytest.mark.parametrize("name", ["threshold", "blur"])
def test_mask_refuses_nan(name, server, parts):
    parts.keep("DCDD_UncertaintyMask", condition=parts.condition, **{name: NAN})
    refuse(server, parts.graph, name, "finite number")


def test_blank_prompt(server, graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    graph.keep(graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, prompt=" \n "), "blank")
    refuse(server, graph, "prompt is blank", "say what to draw")


def test_too_many_steps(server, parts):
    parts.paint(steps=101)
    refuse(server, parts.graph, "steps", "bigger than max")


def test_no_calibration_and_two_of_them(server, parts):
    parts.keep("DCDD_LogitCalibrator", token_logits=parts.proxies, vq_vae=parts.vq)
    refuse(server, parts.graph, "connect exactly one")
    both = {"decoder": parts.decoder, "reference": parts.proxies}
    parts.keep("DCDD_LogitCalibrator", token_logits=parts.proxies, vq_vae=parts.vq, **both)
    refuse(server, parts.graph, "connect exactly one")


def test_fit_to_what_no_model_said(server, parts):
    found = {"token_logits": parts.proxies, "vq_vae": parts.vq, "reference": parts.proxies}
    parts.keep("DCDD_LogitCalibrator", **found)
    refuse(server, parts.graph, "got those of an image", "connect a Janus Logit Sampler")


def test_two_columns_of_one_name(server, parts):
    found = {"token_logits": parts.proxies, "token_logits_b": parts.proxies, "names": "same, same"}
    parts.keep("DCDD_LogitStatistics", **found)
    refuse(server, parts.graph, "same", "give each")


@pytest.mark.parametrize("name", ["", "../outside", "a/b", ".hidden"])
def test_calibrations_name_that_is_none(name, server, graph):
    found = graph.add("load", "DCDD_LoadCalibration", file="good.safetensors")
    graph.add("save", "DCDD_SaveCalibration", calibration=found, name=name)
    refuse(server, graph, "not a valid file name")
    assert not list(server.base.glob("models/**/outside*"))


def test_download_offline(server, info, graph):
    choices = info["DCDD_DownloadModel"]["input"]["required"]["model"][1]["options"]
    graph.add("get", "DCDD_DownloadModel", model=next(choice for choice in choices if "autoencoder" in choice))
    refuse(server, graph, "offline")


def test_single_file_that_is_there_is_found_offline(server, info, graph):
    choices = info["DCDD_DownloadModel"]["input"]["required"]["model"][1]["options"]
    file = server.base / "models" / "vae" / "ae.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    try:
        graph.add("get", "DCDD_DownloadModel", model=next(choice for choice in choices if "autoencoder" in choice))
        run = server.run(graph.prompt)
        assert run.status == "success" and f" is at {file}" in run.notices["get"][-1], run.error
        assert server.run(graph.prompt).executed == []
        (file.parent / "another.safetensors").touch()
        assert server.run(graph.prompt).executed == [], "of the folder, its own file alone counts"
    finally:
        for path in file.parent.glob("*.safetensors"):
            path.unlink()


# --- pictures and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["encode", "paint", "compare", "doubt"])
@pytest.mark.parametrize(("picture", "word"), [({"fill": NAN}, "NaN"), ({"channels": 2}, "channels")])
def test_what_is_no_picture(node, picture, word, server, parts):
    image = parts.graph.add("bad", "TEST_Picture", **{"fill": "noise", **picture})
    if node == "encode":
        parts.keep("DCDD_VQVAEEncode", vq_vae=parts.vq, image=image)
    elif node == "paint":
        parts.paint(image=image, mask=parts.mask())
    elif node == "compare":
        parts.keep("DCDD_CompareDecoders", image_a=parts.image, image_b=image)
    else:
        parts.keep("DCDD_UncertaintyMask", condition=parts.condition, image=image)
    refuse(server, parts.graph, word)


@pytest.mark.parametrize("node", ["paint", "edit"])
@pytest.mark.parametrize(("mask", "words"), [({"value": NAN}, ["mask", "NaN"]), ({"batch": 3}, ["3", "2", "mask"])])
def test_mask_that_does_not_fit(node, mask, words, server, parts):
    area = parts.mask(**mask)
    if node == "paint":
        parts.paint(image=parts.image, mask=area)
    else:
        parts.edit(parts.calibrated(parts.proxies), mask=area)
    refuse(server, parts.graph, *words)


def test_pictures_that_do_not_fit(server, parts):
    three = parts.graph.add("three", "TEST_Picture", fill="noise", batch=3)
    parts.paint(image=three, mask=parts.mask())
    refuse(server, parts.graph, "image", "2")
    parts.keep("DCDD_CompareDecoders", image_a=parts.image, image_b=three)
    refuse(server, parts.graph, "side by side")


@pytest.mark.parametrize("given", ["image", "mask"])
def test_paint_with_one_of_picture_and_mask(given, server, parts):
    parts.paint(**{given: parts.image if given == "image" else parts.mask()})
    refuse(server, parts.graph, "image and a mask", "connect both")


@pytest.mark.parametrize("given", ["token_logits", "mask"])
def test_edit_with_one_of_tokens_and_mask(given, server, parts):
    janus = parts.graph.add("janus", "DCDD_LoadJanus")
    value = parts.calibrated(parts.proxies) if given == "token_logits" else parts.mask()
    parts.keep("DCDD_JanusLogitSampler", janus=janus, **{given: value})
    refuse(server, parts.graph, "token_logits and a mask", "connect both")


def test_empty_mask_keeps_the_picture_and_says_so(server, parts):
    parts.paint(image=parts.image, mask=parts.mask(value=0.0))
    parts.graph.keep(("faulty", 0), "kept")
    parts.graph.keep(parts.image, "given")
    run = server.run(parts.graph.prompt)
    assert run.status == "success", run.error
    assert any("mask is empty" in text for text in run.notices["faulty"]), dict(run.notices)
    np.testing.assert_array_equal(server.saved("kept")["value"], server.saved("given")["value"])


def test_empty_mask_keeps_the_tokens_and_says_so(server, parts):
    parts.edit(parts.calibrated(parts.proxies), mask=parts.mask(value=0.0))
    parts.graph.keep(("faulty", 0), "kept")
    parts.graph.keep(parts.proxies, "given")
    run = server.run(parts.graph.prompt)
    assert run.status == "success", run.error
    assert any("mask is empty" in text for text in run.notices["faulty"]), dict(run.notices)
    np.testing.assert_array_equal(server.saved("kept")["tokens"], server.saved("given")["tokens"])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("DCDD_LoadDecoder", "bundle"),
        ("DCDD_LoadDecoder", "base_model"),
        ("DCDD_LoadDecoder", "vae"),
        ("DCDD_LoadJanus", "model"),
        ("DCDD_LoadVQVAE", "model"),
        ("DCDD_LoadCalibration", "file"),
    ],
)
@pytest.mark.parametrize("file", ["gone.safetensors", "../../outside"])
def test_model_that_is_not_there(kind, name, file, server, graph):
    bundle = {"bundle": "bundle.safetensors"} if kind == "DCDD_LoadDecoder" else {}
    graph.add("end", "TEST_Hold", value=graph.add("load", kind, **{**bundle, name: file}))
    refuse(server, graph, file)


@pytest.mark.parametrize(
    ("kind", "files", "words"),
    [
        (
            "DCDD_LoadCalibration",
            {"file": "cut.safetensors"},
            ["cut.safetensors", "cannot be read as a file with a calibration"],
        ),
        ("DCDD_LoadCalibration", {"file": "damaged.safetensors"}, ["damaged.safetensors"]),
        ("DCDD_LoadDecoder", {"bundle": "cut.safetensors", "vae": "pico/"}, ["cut.safetensors", "download it again"]),
        ("DCDD_LoadDecoder", {"bundle": "damaged.safetensors", "vae": "pico/"}, ["damaged.safetensors"]),
        ("DCDD_LoadJanus", {"model": "cut"}, ["cut", "again"]),
        ("DCDD_LoadVQVAE", {"model": "cut"}, ["cut", "again"]),
    ],
    ids=["cut calibration", "damaged calibration", "cut decoder", "damaged decoder", "cut janus", "cut vq-vae"],
)
def test_damaged_file(kind, files, words, server, graph):
    graph.add("end", "TEST_Hold", value=graph.add("load", kind, **files))
    refuse(server, graph, *words)


def test_decoder_without_an_autoencoder(server, parts):
    bare = parts.graph.add("bare", "DCDD_LoadDecoder", bundle="bundle.safetensors")
    parts.paint(decoder=bare)
    refuse(server, parts.graph, "without an autoencoder", "connect a FLUX VAE")


def test_vae_of_another_kind(server, parts):
    parts.paint(vae=parts.graph.add("vae", "TEST_RandomVAE", channels=4, factor=8))
    refuse(server, parts.graph, "4 channels", "1/8", "1/4")


# --- another model's tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["another", "tiny"])
@pytest.mark.parametrize("node", ["map", "decode", "decode softly", "paint", "calibrate", "edit", "map for a decoder"])
def test_another_codebook(model, node, server, parts):
    vq, foreign = parts.encode("other", model, height=96 if model == "another" else 16)
    if node == "map":
        parts.keep("DCDD_LCDMEncoder", token_logits=foreign, vq_vae=parts.vq)
    elif node == "decode":
        parts.keep("DCDD_VQVAEDecode", token_logits=foreign, vq_vae=parts.vq)
    elif node == "decode softly":
        parts.keep("DCDD_VQVAEDecode", token_logits=foreign, vq_vae=parts.vq, codes="soft: the expected codes")
    elif node == "calibrate":
        parts.keep("DCDD_LogitCalibrator", token_logits=foreign, vq_vae=vq, decoder=parts.decoder)
    elif node == "edit":
        parts.edit(foreign, mask=parts.mask())
    elif node == "map for a decoder":
        parts.keep("DCDD_LCDMEncoder", token_logits=foreign, vq_vae=vq, decoder=parts.decoder)
    else:
        parts.paint(condition=parts.graph.add("foreign", "DCDD_LCDMEncoder", token_logits=foreign, vq_vae=vq))
    refuse(server, parts.graph, "codebook")


def test_edit_of_another_grid(server, parts):
    _, small = parts.encode("small", "pico (built in)", height=64, width=64)
    parts.edit(parts.calibrated(small), mask=parts.mask())
    refuse(server, parts.graph, "64 x 64", "crop to a square: 96 x 96")


def test_edit_of_uncalibrated_tokens(server, parts):
    parts.edit(parts.proxies, mask=parts.mask())
    refuse(server, parts.graph, "add a Logit Calibrator")


# --- values where a link belongs --------------------------------------------------------------------------------------


def test_literals_in_sockets(server, graph):
    """ComfyUI lets numbers and texts through where only a link makes sense; every socket of every node is tried."""
    prompt, info = everything(graph).prompt, graph.info
    assert server.run(prompt).status == "success"
    widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    wrong, tried = [], 0
    # From the end: what a fault does not reach stays cached.
    for node in reversed(prompt):
        if not prompt[node]["class_type"].startswith("DCDD_"):
            continue
        for name, spec in inputs(info[prompt[node]["class_type"]]).items():
            for value in () if spec[0] in widgets else (5, "text"):
                tried += 1
                changed = {**prompt, node: {**prompt[node], "inputs": {**prompt[node]["inputs"], name: value}}}
                run = server.run(changed)
                clear = run.error_type in ("", "ValueError") and re.search(r"connect|choose", run.error)
                if run.status not in ("error", "rejected") or not clear or UNCLEAR.search(run.error):
                    wrong.append(f"{node}.{name} = {value!r}: {run.status} {run.error_type}: {run.error}")
    assert tried > 50
    assert not wrong, "\n".join(wrong)
    assert server.run(prompt).status == "success"
