"""Nodes for tests alone: pictures and masks as no node makes them, results in files, and an interrupt."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_execution.utils import get_executing_context


class Anything(str):
    """A socket type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = Anything("*")


class Picture:
    """Noise, or one number everywhere, in any shape; NaN too."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        numbers = {"batch": 1, "height": 96, "width": 96, "channels": 3, "seed": 0}
        return {"required": {k: ("INT", {"default": v}) for k, v in numbers.items()} | {"fill": ("STRING", {})}}

    def make(self, batch, height, width, channels, seed, fill):
        draw = torch.Generator().manual_seed(seed)
        # From float64, so that small numbers have bits that a way through -1..1 would lose.
        image = torch.rand(batch, height, width, channels, generator=draw, dtype=torch.float64).float()
        return (image if fill == "noise" else torch.full_like(image, float(fill)),)


class Mask:
    """A rectangle of a value in a mask of zeros."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        numbers = {"batch": 1, "height": 96, "width": 96, "top": 0, "left": 0, "bottom": 0, "right": 0}
        return {"required": {k: ("INT", {"default": v}) for k, v in numbers.items()} | {"value": ("FLOAT", {})}}

    def make(self, batch, height, width, top, left, bottom, right, value):
        mask = torch.zeros(batch, height, width)
        mask[:, top:bottom, left:right] = value
        return (mask,)


class One:
    """One picture of a batch: of a tensor, of token logits, of a condition."""

    RETURN_TYPES = (ANY,)
    FUNCTION = "take"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY, {}), "index": ("INT", {"default": 0})}}

    def take(self, value, index):
        if isinstance(value, torch.Tensor):
            return (value[index : index + 1],)
        return (replace(value, **{k: v[index : index + 1] for k, v in _tensors(value).items()}),)


class Save:
    """Every tensor and text of a value, bit by bit, in output/NAME.npz."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY, {}), "name": ("STRING", {})}}

    def save(self, value, name):
        arrays = {k: v.cpu().numpy() for k, v in _tensors(value).items()} or {"value": np.array(value)}
        np.savez(Path(folder_paths.get_output_directory()) / f"{name}.npz", **arrays)
        return {"ui": {"text": [name]}}


class Hold:
    """An end for what is not to be seen, so that its nodes run."""

    RETURN_TYPES = ()
    FUNCTION = "hold"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY, {})}}

    def hold(self, value):
        return ()


class Interrupt:
    """Hands a value on; the page's stop button is pressed right after a node's report of that number.

    Reports that nothing is done yet do not count.
    """

    RETURN_TYPES = (ANY,)
    FUNCTION = "arm"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY, {}), "node": ("STRING", {}), "report": ("INT", {"default": 1})}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")

    def arm(self, value, node, report):
        _armed.clear()
        _armed[node] = report
        report_of = comfy.utils.ProgressBar.update_absolute
        if report_of.__name__ != "interrupting":

            def interrupting(bar, done, *args):
                report_of(bar, done, *args)
                running = get_executing_context().node_id
                if running in _armed and done > 0:
                    _armed[running] -= 1
                    if _armed[running] == 0:
                        del _armed[running]
                        comfy.model_management.interrupt_current_processing()

            comfy.utils.ProgressBar.update_absolute = interrupting
        return (value,)


_armed: dict[str, int] = {}


class RandomVAE:
    """ComfyUI's own VAE of random weights, with so many latent channels and pixels a latent."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        numbers = {"channels": ("INT", {"default": 16}), "factor": ("INT", {"default": 4})}
        more = {"film": ("BOOLEAN", {"default": False}), "spread": ("FLOAT", {"default": 2.77})}
        return {"required": numbers | more}

    def make(self, channels, factor, film, spread):
        shape = {"double_z": True, "z_channels": channels, "resolution": 96, "in_channels": 3, "out_ch": 3, "ch": 32}
        shape |= {"ch_mult": [1] * factor.bit_length(), "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
        vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": shape, "embed_dim": channels}})
        draw = torch.Generator().manual_seed(0)
        for weight in vae.first_stage_model.parameters():
            weight.data = torch.randn(weight.shape, generator=draw) / weight[0].numel() ** 0.5
        vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = channels, factor, factor
        encode, (noise,) = vae.encode, Picture().make(1, 96, 96, 3, 0, "noise")
        by = spread / float(encode(noise).std())
        vae.encode = lambda pixels: by * encode(pixels)
        if film:  # as ComfyUI says of those
            vae.downscale_ratio = (lambda frames: frames, factor, factor)
        return (vae,)


class RandomModel:
    """One of ComfyUI's own architectures, narrow and with random weights, and the conditioning that it takes."""

    RETURN_TYPES = ("MODEL", "CONDITIONING")
    FUNCTION = "make"
    CATEGORY = "test"

    _UNET = types.MappingProxyType(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 64,
            "channel_mult": [1, 2],
            "num_res_blocks": [1, 1],
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "legacy": False,
            "dtype": torch.float32,
        }
    )
    #: Its class in comfy.supported_models, what is said of its network, and the widths of its text.
    KINDS = types.MappingProxyType(
        {
            "SD15": (
                {**_UNET, "context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None},
                768,
                768,
            ),
            "SDXL": (
                {
                    **_UNET,
                    "context_dim": 2048,
                    "use_linear_in_transformer": True,
                    "adm_in_channels": 2816,
                    "num_classes": "sequential",
                },
                2048,
                1280,
            ),
            "Flux": (
                {
                    "image_model": "flux",
                    "in_channels": 16,
                    "out_channels": 16,
                    "vec_in_dim": 768,
                    "context_in_dim": 4096,
                    "hidden_size": 64,
                    "mlp_ratio": 4.0,
                    "num_heads": 2,
                    "depth": 1,
                    "depth_single_blocks": 1,
                    "axes_dim": [8, 12, 12],
                    "theta": 10000,
                    "qkv_bias": True,
                    "guidance_embed": True,
                    "patch_size": 2,
                    "dtype": torch.float32,
                },
                4096,
                768,
            ),
        }
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(cls.KINDS), {})}}

    def make(self, kind):
        import comfy.model_patcher
        import comfy.supported_models

        unet, text, pooled = self.KINDS[kind]
        if kind == "Flux":
            from comfy.ldm.flux.model import FluxParams

            # Of newer versions alone: positions of the text, which FLUX.1 has none of.
            unet = unet | {key: [] for key in ("txt_ids_dims",) if key in {one.name for one in fields(FluxParams)}}
        config = getattr(comfy.supported_models, kind)(dict(unet))
        model = config.get_model({}, "")
        draw = torch.Generator().manual_seed(0)
        for weight in model.diffusion_model.parameters():
            spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.data = torch.randn(weight.shape, generator=draw) * spread
        device = comfy.model_management.get_torch_device()
        patcher = comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=device)
        said = {"pooled_output": torch.zeros(1, pooled), "guidance": 3.5}
        return patcher, [[torch.randn(1, 8, text, generator=draw), said]]


_NODES = (Picture, Mask, One, Save, Hold, Interrupt, RandomVAE, RandomModel)
NODE_CLASS_MAPPINGS = {f"TEST_{node.__name__}": node for node in _NODES}


def _tensors(value) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {"value": value}
    if isinstance(value, (str, float)):
        return {}
    found = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else value
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}
