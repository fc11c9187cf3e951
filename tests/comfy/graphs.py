"""Prompts in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

Link = tuple[str, int]


class Graph:
    """A prompt that grows node by node; inputs that are not named get their defaults."""

    def __init__(self, info: dict[str, Any]):
        """
        Args:
            info: /object_info.
        """
        self.info, self.prompt = info, {}

    def add(self, name: str, kind: str, /, **inputs: Any) -> Link:
        """
        Args:
            inputs: values, or links to other nodes' outputs, as this returns them.

        Returns:
            The node's first output.
        """
        required = self.info[kind]["input"].get("required", {})
        defaults = {key: default(spec) for key, spec in required.items() if default(spec) is not None}
        self.prompt[name] = {"class_type": kind, "inputs": defaults | inputs}
        return name, 0

    def keep(self, link: Link, name: str) -> None:
        """Has the value at a link written to a file: see `ComfyServer.saved`."""
        self.add(f"save_{name}", "TEST_Save", value=link, name=name)

    def look(self, link: Link) -> None:
        """Has a picture shown, so that its nodes run."""
        self.add(f"look_{link[0]}_{link[1]}", "PreviewImage", images=link)


def output(link: Link, index: int) -> Link:
    """Another output of the same node."""
    return link[0], index


def options(spec: list) -> list[str] | None:
    """What a combo offers, as older nodes and newer ones say it; None for another input."""
    if isinstance(spec[0], list):
        return spec[0]
    return spec[1]["options"] if spec[0] == "COMBO" else None


def default(spec: list) -> Any:
    """An input's own value; None where it has none."""
    more = spec[1] if len(spec) > 1 else {}
    return more.get("default", next(iter(options(spec) or []), None))


def everything(graph: Graph) -> Graph:
    """A prompt that uses every node of the pack, with pico."""
    janus = graph.add("load", "DCDD_LoadJanus")
    vq = graph.add("load_vq", "DCDD_LoadVQVAE")
    decoder = graph.add("load_decoder", "DCDD_LoadDecoder")
    scene = graph.add("scene", "DCDD_PicoScene", batch_size=2)
    sampled = graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, guidance=3.0, batch_size=2)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=scene)
    graph.add("fit", "DCDD_LogitCalibrator", token_logits=proxies, vq_vae=vq, reference=sampled, anchored=True)
    graph.add("save", "DCDD_SaveCalibration", calibration=("fit", 1), name="fitted")
    read = graph.add("read", "DCDD_LoadCalibration", file="good.safetensors")
    calibrated = graph.add("calibrate", "DCDD_LogitCalibrator", token_logits=proxies, vq_vae=vq, calibration=read)
    mask = graph.add("mask", "TEST_Mask", left=48, bottom=96, right=96, value=1.0)
    edit = {"token_logits": calibrated, "mask": mask, "parallel_tokens": 4}
    edited = graph.add("edit", "DCDD_JanusLogitSampler", janus=janus, guidance=1.0, **edit)
    masked = graph.add("load_masked", "DCDD_LoadJanus", model="pico progressive (built in)")
    draw = {"janus": masked, "passes": 4, "start": 1, "token_logits": calibrated, "mask": mask}
    passes = graph.add("sample_in_passes", "DCDD_ProgressiveTokenSampler", **draw)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=sampled, vq_vae=vq, decoder=decoder)
    doubt = graph.add("doubt", "DCDD_UncertaintyMask", condition=condition, token_size=8)
    painted = graph.add("paint", "DCDD_FluxDecoder", decoder=decoder, condition=condition, steps=4)
    part = {"image": painted, "mask": doubt, "steps": 4}
    local = graph.add("repaint", "DCDD_FluxDecoder", decoder=decoder, condition=condition, **part)
    tokens = graph.add("decode", "DCDD_VQVAEDecode", token_logits=edited, vq_vae=vq)
    pico = graph.add("load_pico", "DCDD_LoadPicoModel")
    followed = {"token_logits": sampled, "vq_vae": vq}
    seen = {**followed, "vae": output(pico, 1)}
    start = graph.add("start", "DCDD_TokenGuideLatent", model=pico, **seen)
    guided = graph.add("guide", "DCDD_DistributionGuidance", model=pico, **seen)
    texts = {"positive": output(pico, 2), "negative": output(pico, 2)}
    steps = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": output(start, 1)}
    latent = graph.add("sample_guided", "KSampler", model=guided, latent_image=start, **texts, **steps)
    guided_image = graph.add("decode_guided", "VAEDecode", samples=latent, vae=output(pico, 1))
    sharp = graph.add("sharpen", "DCDD_SharpenToTokens", steps=2, **seen)
    graph.add("agree", "DCDD_TokenAgreement", image=guided_image, **followed)
    look = graph.add(
        "statistics",
        "DCDD_LogitStatistics",
        token_logits=sampled,
        token_logits_b=proxies,
        token_logits_c=calibrated,
    )
    sheet = graph.add(
        "compare", "DCDD_CompareDecoders", image_a=tokens, image_b=painted, image_c=local, image_d=("encode", 1)
    )
    for link in (look, sheet, sharp, output(passes, 1), ("doubt", 1)):
        graph.look(link)
    return graph
