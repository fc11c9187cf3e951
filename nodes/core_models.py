"""The embedded prior as ComfyUI's own MODEL, VAE and CONDITIONING, so that core samplers run on it.

Shapes: B batch, C latent channels, h' w' latent grid, H W pixels.
"""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.sd
import comfy.supported_models_base
import numpy as np
import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy_api.latest import io
from einops import rearrange
from torch import nn

from ..dcdd_core import registry
from ..dcdd_core.models.bundle import DecoderOptions
from ..dcdd_core.models.decoder import DistributionConditionedDecoder
from ..dcdd_core.models.prior import load_prior
from ..dcdd_core.protocols import LatentCodec
from ..dcdd_pico.embedded import PRIOR, model_paths
from ..dcdd_pico.scenes import render_scene, scene_pixels
from . import model_folders
from .host import whole_patcher_of
from .sockets import schema


class LoadPicoModel(io.ComfyNode):
    """Pico's unconditional prior for core nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadPicoModel",
            "Load Pico Diffusion Model",
            category="loaders",
            description=(
                "The tiny diffusion model that comes with the pack, in the place of your own FLUX or SDXL: it paints "
                "scenes of coloured shapes of its own choice. Use it to try Distribution Guidance without a download. "
                "It reads no text, so its conditioning is empty and CFG must be 1."
            ),
            search_aliases=["pico", "prior", "diffusion model", "checkpoint", "ksampler"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For Distribution Guidance and samplers."),
                io.Vae.Output("vae", display_name="vae", tooltip="Its own VAE: 16 channels at 1/4 of the size."),
                io.Conditioning.Output(
                    "conditioning",
                    display_name="conditioning",
                    tooltip="Empty; for both positive and negative of a sampler.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        return model_folders.state_of(model_paths()["decoder"].parent)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        paths = model_paths()
        codec = registry.load_codec(paths["vae"], dtype=torch.float32)
        # A sampler does not announce its schedule, so nothing is folded.
        difference = paths["decoder"].with_name(PRIOR)
        decoder = load_prior(paths["decoder"], difference, options=DecoderOptions(dtype=torch.float32, fold=False))
        return io.NodeOutput(_model(decoder, codec), _vae(codec), [[torch.zeros(1, 1, 1), {}]])


NODES = [LoadPicoModel]

#: Side in pixels and number of the scenes that the colours of previews are fitted to.
_SIDE, _SCENES = 96, 16


class _Prior(nn.Module):
    """The network that a sampler asks for velocities."""

    def __init__(self, decoder: DistributionConditionedDecoder, codec: LatentCodec):
        super().__init__()
        self.decoder = decoder
        self._codec = codec
        self._contexts: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, **_: Any) -> torch.Tensor:
        """
        Args:
            x: [B, C, h', w'] noisy latents of variance about 1.
            timestep: [B], 1 is pure noise.
        """
        size = (x.shape[2], x.shape[3])
        backbone = self.decoder.backbone
        packed = backbone.pack(x)
        nothing = self.decoder.adapter.token.expand(len(x), packed.shape[1], -1)
        context = self._context(size).to(x)
        velocity = self.decoder(packed, context, nothing, timestep.float().cpu(), size)
        return backbone.unpack(velocity, size)

    def _context(self, size: tuple[int, int]) -> torch.Tensor:
        """The backbone's context for a canvas that is painted everywhere; encoded once per size."""
        if size not in self._contexts:
            codec = self._codec
            height, width = (side * codec.factor for side in size)
            given = codec.normalize(codec.encode(torch.zeros(1, 3, height, width)))
            self._contexts[size] = self.decoder.backbone.context(given, torch.ones(1, 1, height, width), codec.factor)
        return self._contexts[size]


def _model(decoder: DistributionConditionedDecoder, codec: LatentCodec) -> Any:
    """The decoder as a MODEL whose samples follow the flow's path."""
    colours = _colours(codec)

    class Latents(comfy.latent_formats.LatentFormat):
        latent_channels = codec.channels
        spacial_downscale_ratio = codec.factor

        def __init__(self):
            self.latent_rgb_factors, self.latent_rgb_factors_bias = colours[:-1], colours[-1]

        def process_in(self, latent: torch.Tensor) -> torch.Tensor:
            return codec.normalize(latent)

        def process_out(self, latent: torch.Tensor) -> torch.Tensor:
            return codec.denormalize(latent)

    class Config(comfy.supported_models_base.BASE):
        latent_format = Latents

    config = Config({"disable_unet_model_creation": True})
    config.sampling_settings["shift"] = decoder.card.shift
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.FLUX)
    model.diffusion_model = _Prior(decoder, codec)
    return whole_patcher_of(model.eval())


def _colours(codec: LatentCodec) -> list[list[float]]:
    """Colours in -1..1 as a linear function of normalised latents, [C + 1, 3]: a row per channel, then the bias. Fitted
    to some scenes; ComfyUI's samplers draw their previews with it."""
    images = np.stack([render_scene("train", k, size=_SIDE).image for k in range(_SCENES)])
    pixels = scene_pixels(images, torch.device("cpu"))
    latents = codec.normalize(codec.encode(pixels))
    given = rearrange(F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0), "b c h w -> (b h w) c")
    wanted = rearrange(F.avg_pool2d(pixels, codec.factor), "b c h w -> (b h w) c")
    return torch.linalg.lstsq(given, wanted).solution.tolist()


def _vae(codec: LatentCodec) -> comfy.sd.VAE:
    """The codec as a ComfyUI VAE: a small one is made and its network replaced."""
    levels = codec.factor.bit_length()
    shape = {"double_z": True, "z_channels": codec.channels, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape |= {"ch_mult": [1] * levels, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params = {"ddconfig": shape, "embed_dim": codec.channels}
    # All its weights are given, since ComfyUI warns about missing ones.
    vae = comfy.sd.VAE(sd=AutoencoderKL(**params).state_dict(), config={"params": params}, dtype=torch.float32)
    vae.first_stage_model = _Network(codec)
    vae.patcher = whole_patcher_of(vae.first_stage_model)
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = codec.channels, codec.factor, codec.factor
    return vae


class _Network(nn.Module):
    """A codec's network with the methods that ComfyUI's VAE calls."""

    def __init__(self, codec: LatentCodec):
        super().__init__()
        self.model = codec.model
        self._codec = codec

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in -1..1 -> raw latents [B, C, h', w']."""
        return self._codec.encode(pixels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents [B, C, h', w'] -> [B, 3, H, W] in -1..1."""
        return self._codec.decode(latents)
