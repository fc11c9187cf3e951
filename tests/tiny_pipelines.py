"""diffusers pipelines of tiny random networks: FLUX.1, FLUX.2 [klein], SDXL and Stable Diffusion 1.x."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.tiny import fill

_WIDTH = 32


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    pipe = FluxImg2ImgPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(16, shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=fill(transformer, 1),
    )
    pipe.encode_prompt = lambda **_: (torch.ones(1, 3, _WIDTH), torch.ones(1, _WIDTH), torch.zeros(3, 3))
    return pipe


def klein(width=_WIDTH):
    """4 raw channels at 2 pixels a latent, 16 in patches; only where diffusers has the class."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae = fill(vae, 3)
    generator = torch.Generator().manual_seed(6)
    vae.bn.running_mean.copy_(0.1 * torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=fill(transformer, 1),
        is_distilled=True,
    )
    pipe.encode_prompt = lambda **_: (torch.ones(1, 3, width), torch.zeros(1, 3, 4))
    return pipe


def save_klein(folder: Path) -> Path:
    """A whole FLUX.2 [klein] pipeline, with text encoder and tokenizer."""
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = folder / "words"
    words.mkdir(parents=True)
    vocab = {word: k for k, word in enumerate([*"abcdeilru", "Ġ", "<|endoftext|>"])}
    (words / "vocab.json").write_text(json.dumps(vocab))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast.from_pretrained(words)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    pipe = klein(width=3 * config.hidden_size)
    del pipe.encode_prompt
    pipe.register_modules(tokenizer=tokenizer, text_encoder=fill(Qwen3ForCausalLM(config), 4))
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def sdxl(prediction="epsilon"):
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=_WIDTH + 6 * 8,
        transformer_layers_per_block=1,
    )
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModel(_text_config()),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=_scheduler(prediction),
        add_watermarker=False,
    )
    hidden, pooled = torch.ones(1, 3, _WIDTH), torch.ones(1, _WIDTH)
    pipe.text_encoder_2.config.projection_dim = _WIDTH
    pipe.encode_prompt = lambda *_, **__: (hidden, 0 * hidden, pooled, 0 * pooled)
    return pipe


def sd(prediction="epsilon"):
    pipe = StableDiffusionImg2ImgPipeline(
        vae=_vae(4),
        text_encoder=None,
        tokenizer=None,
        unet=_unet(),
        scheduler=_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.encode_prompt = lambda *_, **__: (torch.ones(1, 3, _WIDTH), torch.zeros(1, 3, _WIDTH))
    return pipe


def save_sd(folder: Path) -> Path:
    """A whole Stable Diffusion 1.x pipeline, with text encoder and tokenizer."""
    words = folder / "words"
    words.mkdir(parents=True)
    letters = ["a", "b", "c", "red", "circle"]
    vocab = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(vocab)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=16)
    pipe = sd()
    del pipe.encode_prompt
    pipe.register_modules(tokenizer=tokenizer, text_encoder=fill(CLIPTextModel(_text_config(len(vocab))), 4))
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _text_config(words=12):
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=_WIDTH,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )


def _scheduler(prediction):
    return EulerDiscreteScheduler(prediction_type=prediction, beta_schedule="scaled_linear", steps_offset=1)


def _unet(**more):
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )
    return fill(unet, 2)


def _vae(channels, **more):
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.4,
        **more,
    )
    return fill(vae, 3)


def tiny_autoencoder(channels):
    """A small autoencoder like TAESD, of 2 pixels a latent, with a scale and a shift that matter."""
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=channels,
        scaling_factor=2.0,
        shift_factor=0.25,
    )
    return fill(model, 5)
