"""Calibrations: fitted, applied, and kept in files."""

from __future__ import annotations

from comfy_api.latest import io

from ..dcdd_core.method.calibration import PASSES, apply_calibration
from ..dcdd_core.pipelines.calibrate import fit_to
from ..dcdd_core.protocols import ImageTokenizer
from ..dcdd_core.types import Calibration, TokenLogits
from . import checks, host, model_folders
from .host import Managed
from .sockets import (
    CONNECT_LOGITS,
    CONNECT_VQ,
    CalibrationSocket,
    Decoder,
    DecoderSocket,
    TokenLogitsSocket,
    VQVAESocket,
    expect,
    schema,
)


class LogitCalibrator(io.ComfyNode):
    """Applies a calibration, or fits one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LogitCalibrator",
            "Logit Calibrator",
            category="tokens",
            description=(
                "Makes the proxy logits of an image as confident, or as uncertain, as the language model's own: "
                "the decoder was trained on such logits. Takes the calibration from a decoder or a file, or fits a "
                "new one: connect exactly one of decoder, calibration and reference. An LCDM Encoder with a "
                "decoder connected calibrates by itself; use this node to inspect or fit a calibration, or to edit "
                "an image of your own."
            ),
            search_aliases=["calibration", "temperature scaling", "fit calibration", "LC"],
            inputs=[
                TokenLogitsSocket.Input(
                    "token_logits", tooltip="The logits to calibrate: proxy logits of an image, or Janus' own."
                ),
                VQVAESocket.Input("vq_vae", tooltip="The tokenizer that these logits belong to."),
                DecoderSocket.Input(
                    "decoder", optional=True, tooltip="Uses the calibration that is stored in the decoder's bundle."
                ),
                CalibrationSocket.Input(
                    "calibration", optional=True, tooltip="From Load Calibration, or from another Logit Calibrator."
                ),
                TokenLogitsSocket.Input(
                    "reference",
                    optional=True,
                    tooltip=(
                        "To fit a calibration: token_logits of many sampled images (100 in the paper). The proxy "
                        "logits in token_logits are fitted to these."
                    ),
                ),
                io.Boolean.Input(
                    "anchored",
                    default=False,
                    tooltip=(
                        "For Janus' own logits: pulls each distribution towards the sampled token, as strongly as "
                        "the calibration says. When fitting, this strength is fitted too. Off matches the paper."
                    ),
                ),
            ],
            outputs=[
                TokenLogitsSocket.Output("calibrated", display_name="token_logits", tooltip="The calibrated logits."),
                CalibrationSocket.Output(
                    "used",
                    display_name="calibration",
                    tooltip="The calibration that was used. Connect to Save Calibration.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        token_logits: TokenLogits,
        vq_vae: Managed[ImageTokenizer],
        anchored: bool,
        decoder: Decoder | None = None,
        calibration: Calibration | None = None,
        reference: TokenLogits | None = None,
    ) -> io.NodeOutput:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        given = [value for value in (decoder, calibration, reference) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"{len(given) or 'none'} of decoder, calibration and reference are connected: connect exactly one, a "
                "decoder or a calibration to apply its values, or a reference to fit new ones"
            )
        tokenizer = vq_vae.idle
        checks.check_tokenizer(token_logits, tokenizer)
        checks.check_uncalibrated(token_logits)
        with host.noticed():
            if reference is not None:
                expect(reference, TokenLogits, "reference", "connect the token_logits of a Janus Logit Sampler")
                checks.check_fit(token_logits, reference, tokenizer)
                progress = host.NodeProgress(PASSES)
                calibration = fit_to(
                    token_logits, reference, tokenizer.codebook, anchored=anchored, on_pass=progress.step
                )
            elif decoder is not None:
                expect(decoder, Decoder, "decoder", "connect a Load DCDD Decoder")
                calibration = decoder.decoder.idle.card.calibration
                if calibration is None:
                    raise ValueError(
                        "this decoder was trained without a calibration: connect one from a file instead, by Load "
                        "Calibration"
                    )
            expect(calibration, Calibration, "calibration", "connect a Load Calibration")
            checks.check_calibration(calibration, tokenizer)
            used = checks.without_provenance(token_logits, calibration)
            used = used if anchored else used.unanchored
            return io.NodeOutput(apply_calibration(token_logits, tokenizer.codebook, used), calibration)


class SaveCalibration(io.ComfyNode):
    """CALIBRATION -> file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "SaveCalibration",
            "Save Calibration",
            category="tokens",
            description="Saves a calibration in models/dcdd/calibrations. Existing files are never overwritten.",
            search_aliases=["export calibration"],
            is_output_node=True,
            inputs=[
                CalibrationSocket.Input("calibration", tooltip="From a Logit Calibrator."),
                io.String.Input(
                    "name", default="calibration", tooltip="File name; a number is added if the file exists."
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Path of the saved file.")],
        )

    @classmethod
    def execute(cls, calibration: Calibration, name: str) -> io.NodeOutput:
        expect(calibration, Calibration, "calibration", "connect the calibration of a Logit Calibrator")
        path = model_folders.new_calibration(name)
        calibration.save(path)
        host.tell(f"saved {path.name}: {_in_words(calibration)}")
        return io.NodeOutput(str(path))


class LoadCalibration(io.ComfyNode):
    """File -> CALIBRATION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadCalibration",
            "Load Calibration",
            category="tokens",
            description="Loads a calibration from models/dcdd/calibrations.",
            search_aliases=["import calibration"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=model_folders.calibrations() or [model_folders.NO_CALIBRATION],
                    tooltip="A file written by Save Calibration or `dcdd calibrate`. Press R after adding one.",
                )
            ],
            outputs=[
                CalibrationSocket.Output(
                    "calibration", display_name="calibration", tooltip="Connect to a Logit Calibrator."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return model_folders.state_of(model_folders.calibration_path(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(Calibration.load(model_folders.calibration_path(file)))


NODES = [LogitCalibrator, SaveCalibration, LoadCalibration]


def _in_words(calibration: Calibration) -> str:
    return f"scale {calibration.sharpness:.3f}, smoothing {calibration.smoothing:.4f}, anchor {calibration.anchor:.2f}"
