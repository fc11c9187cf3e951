"""The decoder as it is loaded for painting: the whole one's outputs, and what is held and read for them."""

import gc
import weakref
from functools import cache
from itertools import groupby

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from dcdd_core import files
from dcdd_core.method.flow import timesteps
from dcdd_core.models import bundle as bundles
from dcdd_core.models import checkpoints
from dcdd_core.models.backbones.flux_fill.backbone import FluxFill
from dcdd_core.models.backbones.flux_fill.files import FLUX_FILL_CONFIG
from dcdd_core.models.backbones.flux_fill.inference import drop_text, fold_modulations, of_text_stream
from dcdd_core.models.bundle import DecoderOptions, load_decoder, save_bundle
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.vae import KLCodec
from dcdd_core.pipelines.decode import decode
from tests.tiny import tiny_card, tiny_condition, tiny_decoder, tiny_flux_config, tiny_vae

SIZE = (8, 8)  # latent grid of tiny_condition: 4 x 4 tokens of 2 x 2 latents
TIMES = timesteps(5, shift=0.5)[:-1].tolist()
TIME_ALONE = (".norm1.linear.", ".norm.linear.", "norm_out.linear.", "time_text_embed.")


@pytest.fixture(scope="module")
def whole():
    """All weights, the text's too, in memory; two double and three single blocks."""
    return tiny_decoder(base_config={**tiny_flux_config(), "num_layers": 2, "num_single_layers": 3})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, whole):
    path = tmp_path_factory.mktemp("bundle") / "decoder.safetensors"
    save_bundle(path, whole, dtype=torch.float32)
    return path


@pytest.fixture
def split(tmp_path, whole):
    """Attention and adapter in a bundle, and the base that they go over."""
    save_bundle(tmp_path / "d.safetensors", whole, trained=lambda name: ".attn." in name, dtype=torch.float32)
    whole.transformer.save_pretrained(tmp_path / "base")
    return tmp_path / "d.safetensors", tmp_path / "base"


tiny_condition = cache(tiny_condition)


@torch.no_grad()
def velocity(decoder, t, dtype=torch.float32):
    packed, context = (part.to(dtype) for part in inputs(decoder, 16, torch.Generator().manual_seed(1)))
    t = torch.tensor(t if isinstance(t, list) else [t, t])
    return decoder(packed, context, decoder.condition_tokens(tiny_condition(), SIZE), t, SIZE)


def inputs(decoder, count, generator=None):
    """Random latents [2, count, F] and context [2, count, G] of the backbone's input channels."""
    channels = decoder.transformer.config.in_channels
    return torch.randn(2, count, channels, generator=generator).split([64, channels - 64], dim=2)


def test_a_full_disk_is_said_and_the_old_bundle_stays(tmp_path, whole):
    resource = pytest.importorskip("resource", reason="limits the size of files")
    path, limits = tmp_path / "d.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"the old one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes a file; writing more fails
    try:
        with pytest.raises(OSError, match=r"d.safetensors could not be written .* GB are free there; make room"):
            save_bundle(path, whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"] and path.read_bytes() == b"the old one"


def of_time_alone(name):
    return any(part in name for part in TIME_ALONE) and not of_text_stream(name)


class Reads:
    """What was read off the disk, in order, and the most bytes of it that were in memory at once."""

    def __init__(self):
        self.names, self.alive, self.most, self.checked = [], {}, 0, []

    def add(self, name, tensor):
        self.names.append(name)
        self.alive[len(self.names)] = tensor.numel() * tensor.element_size()
        weakref.finalize(tensor, self.alive.pop, len(self.names))
        self.most = max(self.most, sum(self.alive.values()))
        return tensor


@pytest.fixture
def reads(monkeypatch):
    seen = Reads()

    class Slice:
        def __init__(self, name, part):
            self.name, self.part = name, part

        def __getitem__(self, rows):
            return seen.add(self.name, self.part[rows])

        def __getattr__(self, name):
            return getattr(self.part, name)

    class Opened:
        def __init__(self, *args, **kwargs):
            self.opened = safe_open(*args, **kwargs)

        def __enter__(self):
            self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def keys(self):
            return self.opened.keys()

        def metadata(self):
            return self.opened.metadata()

        def get_slice(self, name):
            return Slice(name, self.opened.get_slice(name))

        def get_tensor(self, name):
            seen.checked.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr(files, "safe_open", Opened)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False}], ids=["guidance", "no guidance"])
def test_every_step_is_that_of_the_whole_model(tmp_path, changes, dtype):
    config = {**tiny_flux_config(), "num_layers": 2, "num_single_layers": 3, **changes}
    whole = tiny_decoder(base_config=config, guidance=3.5)
    save_bundle(tmp_path / "d.safetensors", whole, dtype=torch.float32)
    small, whole = load_decoder(tmp_path / "d.safetensors", options=DecoderOptions(dtype=dtype)), whole.to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    times = timesteps(30, shift=0.5)[:-1].tolist()
    small.prepare(times)
    outputs = [velocity(small, t, dtype) for t in times]
    for t, output in zip(times, outputs):
        torch.testing.assert_close(output, velocity(whole, t, dtype), rtol=tolerance, atol=tolerance)
    assert (outputs[0] - outputs[-1]).abs().max() > 0.1, "the time must matter"


def test_times_may_differ_within_a_batch_and_need_no_preparation(whole, bundle):
    small = load_decoder(bundle)
    torch.testing.assert_close(velocity(small, [0.3, 0.9]), velocity(whole, [0.3, 0.9]), rtol=1e-5, atol=1e-5)
    small.prepare(TIMES)
    mixed = [TIMES[3], TIMES[1]]
    torch.testing.assert_close(velocity(small, mixed), velocity(whole, mixed), rtol=1e-5, atol=1e-5)


def test_positions_are_embedded_once_a_size_and_also_for_a_training_that_follows(monkeypatch, whole):
    decoder, sizes = tiny_decoder(), []
    embed = decoder.transformer.pos_embed.forward
    monkeypatch.setattr(decoder.transformer.pos_embed, "forward", lambda ids: sizes.append(len(ids)) or embed(ids))
    with torch.inference_mode():
        first = velocity(decoder, 0.5)
        velocity(decoder, 0.25)
    assert sizes == [16]
    packed, context = inputs(decoder, 32)
    decoder(packed, context, torch.zeros(2, 32, decoder.transformer.inner_dim), torch.ones(2), (16, 8))
    assert sizes == [16, 32]
    assert torch.equal(velocity(decoder, 0.5), first)
    decoder.requires_grad_(True)
    with torch.inference_mode():
        velocity(decoder, 0.5)
    condition = decoder.condition_tokens(tiny_condition(), SIZE)
    decoder(packed[:, :16], context[:, :16], condition, torch.ones(2), SIZE).sum().backward()
    assert sizes == [16, 32, 16]


def test_guidance_comes_from_the_card(tmp_path, whole, bundle):
    card = tiny_card(base_config=whole.card.base_config, guidance=30.0)
    changed = DistributionConditionedDecoder(FluxFill(whole.transformer, guidance=30.0), card)
    changed.adapter = whole.adapter
    save_bundle(tmp_path / "guided.safetensors", changed, dtype=torch.float32)
    small = load_decoder(tmp_path / "guided.safetensors")
    torch.testing.assert_close(velocity(small, 0.5), velocity(changed, 0.5), rtol=1e-5, atol=1e-5)
    assert (velocity(small, 0.5) - velocity(load_decoder(bundle), 0.5)).abs().max() > 0.01


def test_the_picture_is_the_same(whole, bundle):
    vae = KLCodec(tiny_vae())
    pictures = [decode(d, vae, tiny_condition(), seeds=[1, 2], steps=4).pixels for d in (whole, load_decoder(bundle))]
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)


def test_the_published_shape_keeps_little_more_than_half():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**FLUX_FILL_CONFIG)

    def size():
        return sum(parameter.numel() for parameter in transformer.parameters())

    everything = size()
    drop_text(transformer)
    without_text = size()
    fold_modulations(transformer, checkpoints.StoredTensors({}))
    assert everything == pytest.approx(11.90e9, rel=1e-3)
    assert everything - without_text == pytest.approx(3.24e9, rel=2e-3)
    assert without_text - size() == pytest.approx(2.20e9, rel=2e-3)
    assert size() <= 6.46e9
    assert not [n for n, _ in transformer.named_parameters() if of_text_stream(n) or of_time_alone(n)]


def test_loading_reads_nothing_that_is_dropped(reads, split):
    load_decoder(*split)
    assert len(reads.names) == len(set(reads.names)) > 40
    assert not [name for name in reads.names if of_text_stream(name) or of_time_alone(name)]
    # For the checksums, once, and of the bundle alone.
    assert len(reads.checked) == len(set(reads.checked)) > 20
    assert all(name.startswith("adapter.") or ".attn." in name for name in reads.checked)
    assert not [name for name in reads.checked if of_text_stream(name)]


def test_modulations_are_read_a_layer_at_a_time_and_let_go(reads, whole, split):
    small = load_decoder(*split)
    state = whole.transformer.state_dict()
    gc.collect()
    reads.__init__()
    small.prepare(TIMES)
    assert sorted(reads.names) == sorted(name for name in state if of_time_alone(name))
    layers = {name.rpartition(".")[0] for name in reads.names if "time_text_embed" not in name}
    largest = max(sum(4 * state[f"{layer}.{leaf}"].numel() for leaf in ("weight", "bias")) for layer in layers)
    embedder = sum(4 * value.numel() for name, value in state.items() if name.startswith("time_text_embed."))
    assert reads.most <= max(2 * largest, embedder) < sum(4 * state[name].numel() for name in reads.names) / 2
    assert not reads.alive


def test_a_schedule_is_read_once_and_the_last_three_are_kept(reads, bundle):
    small = load_decoder(bundle)
    vae, condition = KLCodec(tiny_vae()), tiny_condition(1)

    def read_for(steps):
        before = len(reads.names)
        decode(small, vae, condition, seeds=[0], steps=steps)
        return len(reads.names) - before

    once = read_for(2)
    assert once > 0
    assert [read_for(steps) for steps in (2, 3, 4, 2, 3, 4)] == [0, once, once, 0, 0, 0]
    assert [read_for(steps) for steps in (5, 3, 4, 2)] == [once, 0, 0, once]


def test_a_new_schedule_tells_of_its_layers_and_may_be_stopped(whole, bundle):
    small, seen = load_decoder(bundle), []

    def stop(done, total):
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.prepare(TIMES, on_layer=stop)
    small.prepare(TIMES, on_layer=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert total >= 3 and seen == [(1, total), (2, total), *((k + 1, total) for k in range(total))]
    small.prepare(TIMES, on_layer=stop)  # known by now
    torch.testing.assert_close(velocity(small, TIMES[1]), velocity(whole, TIMES[1]), rtol=1e-5, atol=1e-5)


def test_files_that_change_after_loading_are_refused(split):
    path, base = split
    small = load_decoder(path, base)
    small.prepare(TIMES)
    (stored,) = base.glob("*.safetensors")
    save_file(load_file(stored) | {"more": torch.zeros(1)}, stored)
    small.prepare(TIMES)
    with pytest.raises(ValueError, match=r"was changed or removed after it was opened: load it again"):
        small.prepare(TIMES[:2])
    stored.unlink()
    with pytest.raises(ValueError, match=r"was changed or removed"):
        velocity(small, 0.123)


def test_modulations_that_were_trained_come_from_the_bundle(tmp_path, whole):
    other = tiny_decoder(seed=7, base_config=whole.card.base_config)
    other.transformer.save_pretrained(tmp_path / "base")
    save_bundle(tmp_path / "d.safetensors", whole, trained=lambda name: "embedder" not in name, dtype=torch.float32)
    small = load_decoder(tmp_path / "d.safetensors", tmp_path / "base")
    embedders = {k: v for k, v in other.transformer.state_dict().items() if "embedder" in k}
    mixed = tiny_decoder(base_config=whole.card.base_config)
    mixed.transformer.load_state_dict(whole.transformer.state_dict() | embedders)
    torch.testing.assert_close(velocity(small, 0.5), velocity(mixed, 0.5), rtol=1e-5, atol=1e-5)


def test_text_in_a_bundle_is_left_there(tmp_path, reads, whole, bundle):
    """As bundles had it once; a base may lack it."""
    with safe_open(bundle, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(bundle)
    assert not any(map(of_text_stream, tensors))
    text = {f"transformer.{k}": v for k, v in whole.transformer.state_dict().items() if of_text_stream(k)}
    assert len(text) > 20
    save_file(tensors | text, tmp_path / "old.safetensors", metadata=header)
    small = load_decoder(tmp_path / "old.safetensors")
    torch.testing.assert_close(velocity(small, 0.5), velocity(whole, 0.5), rtol=1e-5, atol=1e-5)
    assert not any(map(of_text_stream, reads.names))


def test_a_base_may_lack_the_text(split, whole):
    path, base = split
    (stored,) = base.glob("*.safetensors")
    save_file({k: v for k, v in load_file(stored).items() if not of_text_stream(k)}, stored)
    torch.testing.assert_close(velocity(load_decoder(path, base), 0.5), velocity(whole, 0.5), rtol=1e-5, atol=1e-5)


def test_a_released_bundle_can_be_trained_further(tmp_path, whole, bundle):
    decoder = load_decoder(bundle, options=DecoderOptions(fold=False)).requires_grad_(True)
    condition = decoder.condition_tokens(tiny_condition(), SIZE)
    decoder(*inputs(decoder, 16), condition, torch.tensor([0.2, 0.7]), SIZE).square().mean().backward()
    unreached = [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert not unreached
    assert set(dict(decoder.named_parameters())) < set(dict(whole.named_parameters()))
    save_bundle(tmp_path / "again.safetensors", decoder, dtype=torch.float32)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(bundle).keys()
    with pytest.raises(ValueError, match="load it with fold=False"):
        save_bundle(tmp_path / "never.safetensors", load_decoder(bundle))


def test_eight_bits_hold_the_layers_in_half_and_paint_nearly_the_same(bundle):
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain, small = (
        load_decoder(bundle, options=DecoderOptions(dtype=torch.bfloat16)),
        load_decoder(bundle, options=DecoderOptions(dtype=torch.bfloat16, eight_bit=True)),
    )
    for name, parameter in small.named_parameters():
        inside = "_blocks." in name and "norm" not in name and name.endswith("weight")
        assert (type(parameter.data) is not torch.Tensor) == inside, name
        assert inside or parameter.dtype == torch.bfloat16, name
    assert small.dtype == torch.bfloat16
    exact = velocity(plain, 0.5, torch.bfloat16).float()
    error = (velocity(small, 0.5, torch.bfloat16).float() - exact).std() / exact.std()
    assert 0 < error < 0.05
    streamed = load_decoder(bundle, options=DecoderOptions(dtype=torch.bfloat16, eight_bit=True, streamed=True))
    assert torch.equal(velocity(streamed, 0.5, torch.bfloat16), velocity(small, 0.5, torch.bfloat16))


def test_blocks_are_rounded_one_by_one_as_they_come(bundle, reads, monkeypatch):
    """There is never more than one of them as it was."""
    monkeypatch.setattr(bundles, "store_in_int8", lambda block, device: reads.names.append(f"{device}: rounded"))
    load_decoder(bundle, options=DecoderOptions(eight_bit=True))
    came = [name.rpartition("_blocks.")[2].partition(".")[0] for name in reads.names]
    rounded = ["0", "cpu: rounded", "1", "cpu: rounded", "0", "cpu: rounded", "1", "cpu: rounded", "2", "cpu: rounded"]
    assert [name for name, _ in groupby(came)][: len(rounded)] == rounded


def test_linear_weights_may_be_held_in_a_dtype_of_their_own_and_are_never_in_another(bundle, whole, monkeypatch):
    read, came = checkpoints.StoredTensors.read, {}

    def recording(stored, *args, **options):
        found = read(stored, *args, **options)
        came.update({value.data_ptr(): value for value in found.values()})
        return found

    monkeypatch.setattr(checkpoints.StoredTensors, "read", recording)
    small = load_decoder(bundle, options=DecoderOptions(dtype=torch.float32, linear_dtype=torch.float8_e4m3fn))
    blocks = [f"transformer.{name}." for name in small.backbone.block_names]
    inside = {
        f"{name}.weight"
        for name, part in small.named_modules()
        if isinstance(part, torch.nn.Linear) and name.startswith(tuple(blocks))
    }
    held = dict(small.named_parameters())
    assert inside and inside < set(held)
    for name, weight in held.items():
        expected = whole.get_parameter(name)
        expected = expected.to(torch.float8_e4m3fn) if name in inside else expected
        assert weight.dtype == expected.dtype and torch.equal(weight.float(), expected.float()), name
    assert len(came) >= len(held)
    assert sum(value.dtype == torch.float8_e4m3fn for value in came.values()) == len(inside)
    assert len(came) == len(held), "a matrix was read in another dtype too"
    with pytest.raises(ValueError, match="holds linear weights as int8, got linear_dtype=.*: leave out one of them"):
        DecoderOptions(eight_bit=True, linear_dtype=torch.float8_e4m3fn)


def test_an_older_diffusers_cannot_stream_them(bundle, monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.37.1")
    with pytest.raises(ValueError, match=r"diffusers 0.38 or newer, this is 0.37.1: upgrade it"):
        load_decoder(bundle, options=DecoderOptions(eight_bit=True, streamed=True))


def test_eight_bits_compile_too(traced_only, compiling, bundle):
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain, small = (
        load_decoder(bundle, options=DecoderOptions(eight_bit=True, compiled=compiled)) for compiled in (False, True)
    )
    torch.testing.assert_close(velocity(small, 0.5), velocity(plain, 0.5), rtol=1e-5, atol=1e-5)
    assert compiling["unique_graphs"] == 2


def test_a_bundle_that_is_replaced_while_it_is_read_is_noticed(tmp_path, bundle, monkeypatch):
    path = tmp_path / "d.safetensors"
    path.write_bytes(bundle.read_bytes())
    monkeypatch.setattr(bundles, "store_in_int8", lambda block, device: path.write_bytes(bundle.read_bytes() + b" "))
    with pytest.raises(ValueError, match=r"d.safetensors was changed or removed after it was opened"):
        load_decoder(path, options=DecoderOptions(eight_bit=True))


def test_streamed_blocks_come_and_go_and_the_rest_stays(bundle, whole, monkeypatch):
    """Without a second device: that diffusers' hooks are in place, and run."""
    from diffusers.hooks.group_offloading import ModuleGroup

    fetched = []
    onload = ModuleGroup.onload_
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: (fetched.append(group.onload_leader), onload(group))[1])
    small = load_decoder(bundle, options=DecoderOptions(streamed=True))
    torch.testing.assert_close(velocity(small, 0.5), velocity(whole, 0.5), rtol=1e-5, atol=1e-5)
    assert fetched == [*small.transformer.transformer_blocks, *small.transformer.single_transformer_blocks]


@pytest.mark.parametrize(
    "ways",
    [{"eight_bit": True, "fold": False}, {"streamed": True, "fold": False}, {"streamed": True, "compiled": True}],
)
def test_ways_that_exclude_each_other_are_refused(ways):
    with pytest.raises(ValueError, match="in 8 bits cannot be trained, and streamed weights"):
        DecoderOptions(**ways)


@pytest.fixture
def compiling():
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def paint_compiled(path, stats):
    """Graphs after each of four pictures, the last two with new noise, and on another schedule."""
    small, vae, condition = (
        load_decoder(path, options=DecoderOptions(compiled=True)),
        KLCodec(tiny_vae()),
        tiny_condition(1),
    )
    counts = []
    for seed, steps in ((0, 3), (0, 3), (1, 3), (1, 4)):
        with torch._dynamo.config.patch(error_on_recompile=True):
            pixels = decode(small, vae, condition, seeds=[seed], steps=steps).pixels
        counts.append(stats["unique_graphs"])
    return counts, pixels


@pytest.fixture
def traced_only(monkeypatch):
    """Compiling ends with the graphs, which run as they are: no C++ compiler is needed."""
    compile_blocks = FluxTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(
        FluxTransformer2DModel,
        "compile_repeated_blocks",
        lambda self, **kw: compile_blocks(self, backend="eager", **kw),
    )


def test_a_second_picture_compiles_nothing(traced_only, compiling, whole, bundle):
    counts, pixels = paint_compiled(bundle, compiling)
    assert counts == [2, 2, 2, 2], "one graph for the double blocks, one for the single ones"
    plain = decode(whole, KLCodec(tiny_vae()), tiny_condition(1), seeds=[1], steps=4).pixels
    torch.testing.assert_close(pixels, plain, rtol=1e-4, atol=1e-4)


def test_another_batch_compiles_once_and_past_the_limit_none_does(traced_only, compiling, whole, bundle):
    small, vae, counts = load_decoder(bundle, options=DecoderOptions(compiled=True)), KLCodec(tiny_vae()), []
    for batch in (1, 2, 1, 2, 3):
        with torch._dynamo.config.patch(recompile_limit=2):
            pixels = decode(small, vae, tiny_condition(batch), seeds=range(batch), steps=1).pixels
        counts.append(compiling["unique_graphs"])
    assert counts == [2, 4, 4, 4, 4]
    plain = decode(whole, vae, tiny_condition(3), seeds=range(3), steps=1).pixels
    torch.testing.assert_close(pixels, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_second_picture_compiles_nothing_for_real(compiling, whole, bundle):
    """With a C++ compiler."""
    counts, pixels = paint_compiled(bundle, compiling)
    assert counts == [2, 2, 2, 2]
    plain = decode(whole, KLCodec(tiny_vae()), tiny_condition(1), seeds=[1], steps=4).pixels
    torch.testing.assert_close(pixels, plain, rtol=1e-3, atol=1e-3)
