"""The tokenizer: its features, tokens and two ways back to pixels."""

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.models.janus.tokenizer import load_tokenizer
from dcdd_core.models.vq import VQTokenizer
from tests.tiny import save_janus, tiny_janus, tiny_vq


@pytest.fixture(scope="module")
def vq():
    return VQTokenizer(tiny_vq(), name="tiny")


def pixels(batch=2, height=16, width=16):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_tokens_are_the_nearest_codes_by_cosine(vq):
    features = vq.features(pixels())
    raw = vq.model.quantize.embedding.weight
    nearest = F.cosine_similarity(features[:, :, None], raw[None, None], dim=-1).argmax(-1)
    assert torch.equal(vq.tokens(features), nearest)
    assert torch.equal(vq.encode(pixels()).tokens, nearest)


def test_features_leave_quant_conv_unquantised(vq):
    hidden = vq.model.quant_conv(vq.model.encoder(pixels()))
    features = vq.features(pixels())
    assert features.shape == (2, 16, 8)
    assert torch.equal(features[1, 5], hidden[1, :, 1, 1])


def test_decoding_tokens_is_transformers_own_decode(vq):
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vq.decode_tokens(tokens, (4, 4)), vq.model.decode(tokens).clamp(-1, 1))


def test_decoding_code_vectors_of_tokens_is_decoding_tokens(vq):
    tokens = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vq.decode_vectors(vq.codebook.vectors[tokens], (4, 4)), vq.decode_tokens(tokens, (4, 4)))


@pytest.mark.parametrize("size", [(8, 24), (32, 16)])
def test_any_multiple_of_the_factor_has_a_grid(vq, size):
    proxies = vq.encode(pixels(1, *size))
    assert proxies.grid == (size[0] // 4, size[1] // 4) and proxies.source == "proxy"
    assert vq.decode_tokens(proxies.tokens, proxies.grid).shape == (1, 3, *size)


def test_other_sizes_are_refused_with_the_nearest_that_fits(vq):
    with pytest.raises(ValueError, match="use 16 x 20"):
        vq.features(pixels(1, 17, 21))


def test_foreign_tokens_and_vectors_are_refused(vq):
    with pytest.raises(ValueError, match=r"0\.\.63"):
        vq.decode_tokens(torch.full((1, 16), 64), (4, 4))
    with pytest.raises(ValueError, match=r"\[B, 16, 8\]"):
        vq.decode_vectors(torch.zeros(1, 16, 4), (4, 4))


def test_loading_reads_only_the_vq_part(tmp_path, monkeypatch):
    folder = save_janus(tmp_path / "janus")
    read = []

    class Watched:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *rest):
            return self.file.__exit__(*rest)

        def keys(self):
            return self.opened.keys()

        def get_slice(self, name):
            return self.opened.get_slice(name)

        def get_tensor(self, name):
            read.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr("dcdd_core.files.safe_open", lambda *a, **k: Watched(safe_open(*a, **k)))
    vq = load_tokenizer(folder)
    assert read and all(name.startswith("model.vqmodel.") for name in read)
    assert torch.equal(vq.features(pixels()), VQTokenizer(tiny_janus()[0].model.vqmodel).features(pixels()))


def test_a_vq_folder_of_its_own_loads(tmp_path, vq):
    vq.model.save_pretrained(tmp_path / "vq")
    again = load_tokenizer(tmp_path / "vq", dtype=torch.float32)
    assert again.codebook.fingerprint == vq.codebook.fingerprint
    assert torch.equal(again.features(pixels()), vq.features(pixels()))


def test_a_last_level_without_blocks_has_no_tensors_and_loads(tmp_path):
    """As pico's."""
    config = {**tiny_vq().config.to_dict(), "num_res_blocks": 0}
    model = JanusVQVAE(JanusVQVAEConfig(**config))
    assert not any(name.startswith("encoder.down.2.") for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).factor == 4


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="of type 'llama', expected 'janus'"):
        load_tokenizer(tmp_path)


def test_decoding_runs_with_the_channels_last(vq):
    inputs = []
    hook = vq.model.decoder.conv_in.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for vectors in (torch.rand(2, 16, 8), torch.rand(2, 8, 16).transpose(1, 2)):
        vq.decode_vectors(vectors, (4, 4))
    hook.remove()
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs) and len(inputs) == 2
