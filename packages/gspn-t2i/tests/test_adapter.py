"""Mounting and unmounting, grids, saving, and the company of diffusers' other features."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel, UNet2DModel, UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file, save_file
from t2i_cases import UNETS, inputs, run, same, sd_unet, sdxl_unet
from torch.utils.checkpoint import checkpoint

from gspn_t2i import GSPNAdapter, SelfAttentionMixer
from gspn_t2i.adapter import self_attentions
from gspn_t2i.pipelines import load_adapter

FAMILIES = list(UNETS)
KINDS = ["gspn", "gspn2"]


def mixers(unet):
    return [module for module in unet.modules() if isinstance(module, SelfAttentionMixer)]


# ---- mounting


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_mount_and_unmount(family, kind):
    unet = UNETS[family]()
    before, keys = run(unet), list(unet.state_dict())
    attentions = self_attentions(unet)
    adapter = GSPNAdapter.for_unet(unet, mixer=kind)
    assert list(unet.state_dict()) == keys and torch.equal(run(unet), before)
    assert adapter.mount(unet) is adapter is unet.gspn_adapter
    assert adapter.mounted_on is unet
    assert len(mixers(unet)) == len(attentions) == len(adapter.mixers)
    mounted = run(unet)
    assert mounted.isfinite().all() and not torch.allclose(mounted, before)
    assert adapter.unmount() is unet
    assert adapter.mounted_on is None
    assert list(unet.state_dict()) == keys
    assert torch.equal(run(unet), before)
    assert all(unet.get_submodule(name) is module for name, module in attentions.items())
    assert not any(module._forward_pre_hooks for module in unet.modules())
    assert all(type(module) is Attention for module in attentions.values())
    adapter.mount(unet)
    assert torch.equal(run(unet), mounted)


def test_layers_of_the_real_models():
    """16 self-attentions in SD 1.5, 70 in SDXL, of the widths the papers replace."""
    with torch.device("meta"):
        sd = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        sdxl = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
        )
        found = {}
        for name, unet in (("sd", sd), ("sdxl", sdxl)):
            adapter = GSPNAdapter.for_unet(unet, init="random")
            widths = [shape["channels"] for shape in adapter.config.layers.values()]
            found[name] = {width: widths.count(width) for width in sorted(set(widths))}
            assert adapter.mixer_of(next(iter(adapter.config.layers))).down.weight.shape[0] * 8 == widths[0]
    assert found == {"sd": {320: 5, 640: 5, 1280: 6}, "sdxl": {640: 10, 1280: 60}}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_copied(family):
    unet = UNETS[family]()
    attentions = self_attentions(unet)
    copied, random = (GSPNAdapter.for_unet(unet, init=init) for init in ("qkv", "random"))
    for name, attention in attentions.items():
        assert torch.equal(copied.mixer_of(name).to_q.weight, attention.to_q.weight)
        assert torch.equal(copied.mixer_of(name).to_out[0].bias, attention.to_out[0].bias)
        assert not torch.equal(random.mixer_of(name).to_q.weight, attention.to_q.weight)


def test_some_attentions_stay():
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet, keep_attention=["mid_block", "up_blocks.3"])
    adapter.mount(unet)
    kept = [name for name, module in self_attentions(unet).items() if type(module) is Attention]
    assert kept and all("mid_block" in name or "up_blocks.3" in name for name in kept)
    run(unet)


def test_others_do_not_see_the_grid():
    """Attentions beside the mixers, kept ones of the same transformer too, get what the caller gave and no more."""
    unet = sdxl_unet()
    adapter = GSPNAdapter.for_unet(unet, keep_attention=["transformer_blocks.0"])
    adapter.mount(unet)
    seen = []
    others = [module for module in unet.modules() if type(module) is Attention]
    for module in others:
        module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    given = {"ip_hidden_states": None}
    with torch.no_grad():
        unet(**inputs(unet), cross_attention_kwargs=given)
    assert given == {"ip_hidden_states": None} and len(seen) == len(others) > len(adapter.mixers)
    assert all("gspn_grid" not in kwargs and "ip_hidden_states" in kwargs for kwargs in seen)


# ---- grids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(8, 24), (16, 8), (12, 20)])
def test_height_and_width_are_the_real_ones(family, size):
    """At every level the mixers' grid is the map's, although several grids have as many tokens."""
    unet = UNETS[family]()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    seen, grids = {}, {}
    for name, module in self_attentions(unet).items():
        outer = name.rpartition(".transformer_blocks.")[0]
        unet.get_submodule(outer).register_forward_pre_hook(
            lambda _, args, n=name: seen.update({n: args[0].shape[-2:]})
        )
        module.mixer.register_forward_pre_hook(lambda _, args, n=name: grids.update({n: args[1]}))
    out = run(unet, height=size[0], width=size[1])
    assert out.shape == (2, 4, *size)
    assert len(grids) == len(adapter.mixers) and grids == {name: tuple(shape) for name, shape in seen.items()}
    # The first level of SDXL has no attention.
    assert (size if family == "sd15" else (size[0] // 2, size[1] // 2)) in seen.values()


def test_sizes_may_change_from_call_to_call():
    unet = sd_unet()
    GSPNAdapter.for_unet(unet).mount(unet)
    first = run(unet)
    run(unet, height=16, width=8)
    assert torch.equal(run(unet), first)


def test_a_transposed_image_gives_a_transposed_result():
    """With square kernels made symmetric the network commutes with transposition only if H and W are told apart."""
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet, chunk_size=None)
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                module.weight.copy_((module.weight + module.weight.transpose(2, 3)) / 2)
        for mixer in adapter.mixers.values():
            # Of the four directions, the horizontal pair as the vertical.
            weight, bias = (t.unflatten(0, (4, 3)) for t in (mixer.gates.weight, mixer.gates.bias))
            for t in (weight, bias):
                t[2], t[3] = t[0].clone(), t[1].clone()
    adapter.mount(unet)
    values = inputs(unet, height=8, width=16)
    out = unet(**values).sample
    flipped = unet(**(values | {"sample": values["sample"].transpose(2, 3)})).sample
    torch.testing.assert_close(flipped.transpose(2, 3), out, rtol=1e-3, atol=1e-4)


def test_calls_at_the_same_time():
    """Latents of transposed and other sizes, in three threads."""
    unet = sd_unet()
    GSPNAdapter.for_unet(unet).mount(unet)
    sizes = [(8, 16), (16, 8), (8, 8)]
    expected = [run(unet, height=h, width=w) for h, w in sizes]
    with ThreadPoolExecutor(3) as pool:
        out = list(pool.map(lambda size: run(unet, height=size[0], width=size[1]), sizes * 8))
    assert all(torch.equal(one, two) for one, two in zip(out, expected * 8, strict=True))


def test_a_copy_has_its_own_mixers():
    unet = sd_unet()
    plain, state = run(unet), unet.state_dict()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    expected = run(unet)
    other = copy.deepcopy(unet)
    assert torch.equal(run(other), expected)
    with torch.no_grad():
        mixers(other)[0].to_q.weight.zero_()
    assert torch.equal(run(unet), expected) and not torch.equal(run(other), expected)
    assert other.gspn_adapter.unmount() is other and torch.equal(run(other), plain) and same(other.state_dict(), state)
    assert torch.equal(run(unet), expected)
    other = pickle.loads(pickle.dumps(unet))
    assert torch.equal(run(other), expected) and other.gspn_adapter.mounted_on is other


# ---- saving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(family, kind, tmp_path):
    unet = UNETS[family]()
    adapter = GSPNAdapter.for_unet(unet, mixer=kind, chunk_size=None, proxy=0.5)
    adapter.mount(unet)
    expected = run(unet)
    adapter.save_pretrained(tmp_path)  # mounted: the mixers alone are saved
    adapter.unmount()
    loaded = GSPNAdapter.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), adapter.state_dict())
    names = [name for name, _ in adapter.named_parameters()]  # optimizers and averages go by their order
    assert [name for name, _ in loaded.named_parameters()] == names
    assert [name for name, _ in GSPNAdapter.from_config(adapter.config).named_parameters()] == names
    for one in (adapter, loaded, GSPNAdapter(layers=dict(adapter.config.layers))):
        assert GSPNAdapter.from_config(one.config).config == one.config
    options = ("layers", "mixer", "proxy", "bottleneck", "chunk_size")
    assert [loaded.config[name] for name in options] == [adapter.config[name] for name in options]
    loaded.mount(unet)
    assert torch.equal(run(unet), expected)
    unet_parameters = sum(p.numel() for p in UNETS[family]().parameters())
    assert sum(p.numel() for p in loaded.parameters()) < unet_parameters


@pytest.mark.parametrize("discard", [False, True])
def test_save_a_mounted_unet(discard, tmp_path):
    """It is saved as what it is without the adapter, or not at all."""
    unet = sd_unet()
    before, state = run(unet), unet.state_dict()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet, discard=discard)
    expected = run(unet)
    if discard:
        assert sum(p.numel() for p in unet.parameters()) < 1.2 * sum(p.numel() for p in state.values())
        with pytest.raises(
            ValueError, match="self-attentions were discarded cannot be saved or copied; load it again, or save the"
        ):
            unet.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot be saved or copied"):
            ControlNetModel.from_unet(unet)
        with pytest.raises(ValueError, match="with discard=True cannot be unmounted"):
            adapter.unmount()
        assert not list(tmp_path.iterdir())
    else:
        unet.save_pretrained(tmp_path)
        loaded, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert same(loaded.state_dict(), state) and torch.equal(run(loaded), before)
    assert unet.gspn_adapter is adapter and torch.equal(run(unet), expected)


def test_save_what_a_lora_wraps(tmp_path):
    """Names such as to_q match the mixers', too: they are saved as they are, and not unmounted with it."""
    peft = pytest.importorskip("peft", reason="diffusers loads LoRA with peft")
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    before = adapter.own_weights()
    assert same(before, adapter.state_dict())
    adapter.mount(unet)
    expected = run(unet)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    assert any("base_layer" in key for key in adapter.state_dict()) and not torch.equal(run(unet), expected)
    adapter.save_pretrained(tmp_path)
    assert same(GSPNAdapter.from_pretrained(tmp_path).state_dict(), before)
    with pytest.raises(ValueError, match="the mixers have a LoRA of their own, unload it before"):
        adapter.unmount()
    unet.unload_lora()
    assert torch.allclose(run(unet), expected, atol=1e-5)
    adapter.unmount()
    assert same(adapter.state_dict(), before)


@pytest.mark.parametrize("fault", ["missing", "more", "nan", "inf", "shape", "unet", "cut", "absent", "config"])
def test_load_what_is_no_adapter(fault, tmp_path):
    """Each is named with its file, by the class and by the commands."""
    unet = sd_unet()
    GSPNAdapter.for_unet(unet).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if key.endswith("merge"))
    must, wrong = re.escape(str(file)) + " must hold ", ValueError
    if fault == "missing":
        del weights[key]
        message = rf"{must}the weights of its config.json, missing_keys: \['{key}'\]"
    elif fault == "more":
        weights["other"] = torch.zeros(1)
        message = rf"{must}the weights of its config.json, unexpected_keys: \['other'\]"
    elif fault == "shape":
        weights[key] = torch.zeros(3, 3)
        message = rf"{must}the weights of its config.json: .*{key} expected shape"
    elif fault in ("nan", "inf"):
        weights[key][0, 0] = float(fault)
        message = rf"{must}finite weights, 1 are not, such as {key}"
    else:
        message = {"unet": "must hold a GSPNAdapter, holds a UNet2DConditionModel"}.get(fault, "no adapter")
    save_file(weights, file, metadata={"format": "pt"})
    if fault == "unet":
        unet.save_pretrained(tmp_path)
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif fault == "absent":
        file.unlink()
    elif fault == "config":
        (tmp_path / "config.json").write_text("{")
    if message == "no adapter":
        wrong = FileNotFoundError
    else:
        with pytest.raises(ValueError, match=message):
            GSPNAdapter.from_pretrained(tmp_path)
    with pytest.raises(wrong, match=message):
        load_adapter(str(tmp_path))


# ---- company


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    expected = run(unet)
    unet.to(dtype)
    assert mixers(unet)[0].to_q.weight.dtype == dtype
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(unet).items()}
    with torch.no_grad():
        out = unet(**values).sample
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    adapter.unmount()
    with torch.no_grad():
        assert unet(**values).sample.dtype == dtype


def test_layerwise_casting_and_back():
    unet, plain = sd_unet(), sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    expected = run(unet)
    for one in (unet, plain):
        one.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert mixers(unet)[0].to_q.weight.dtype == torch.bfloat16
    assert (run(unet) - expected).norm() < 0.05 * expected.norm()
    adapter.unmount()
    assert same(unet.state_dict(), plain.state_dict()) and torch.equal(run(unet), run(plain))
    adapter.mount(unet)
    assert (run(unet) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mount_casts(dtype):
    """An adapter in float32 on a UNet in another dtype, unless asked not to."""
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    unet.to(dtype)
    adapter.mount(unet)
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(unet).items()}
    with torch.no_grad():
        assert unet(**values).sample.dtype == dtype
    adapter.unmount()
    adapter.float().mount(unet, cast=False)
    assert adapter.dtype == torch.float32 and unet.dtype == dtype


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(thread, reentrant):
    """Two sizes before one backward pass, which recomputes in a thread that has seen neither."""
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    unet.requires_grad_(False).train()
    adapter.requires_grad_(True)
    gradients = []
    for recompute in (False, True):
        if recompute:
            unet.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=reentrant))
        sizes = [inputs(unet, height=h, width=w) for h, w in ((8, 16), (16, 8), (8, 8))]
        loss = sum(
            unet(**values | {"sample": values["sample"].requires_grad_()}).sample.square().sum() for values in sizes
        )
        if thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            loss.backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        adapter.zero_grad()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_compile():
    """A transformer with mixers is one graph; what a compiler makes of the operator is tested in gspn-core."""
    unet = sd_unet()
    GSPNAdapter.for_unet(unet).mount(unet)
    expected = [run(unet), run(unet, height=8, width=16)]
    unet.down_blocks[0].attentions[0].compile(backend="aot_eager", fullgraph=True)
    for size, wanted in zip(({}, {"width": 16}), expected, strict=True):
        torch.testing.assert_close(run(unet, **size), wanted, rtol=1e-3, atol=1e-4)


def test_compile_repeated_blocks():
    """Mixers cost no graph more than attention does."""
    graphs = []
    for mounted in (False, True):
        unet = sdxl_unet()
        if mounted:
            GSPNAdapter.for_unet(unet).mount(unet)
        sizes = [{}, {"width": 16}, {"height": 16}]
        expected = [run(unet, **size) for size in sizes]
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        for size, wanted in zip(sizes, expected, strict=True):
            torch.testing.assert_close(run(unet, **size), wanted, rtol=1e-3, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_compiled_before_it_is_mounted():
    """Mounting and unmounting change what is computed, and the names are those of the UNet within."""
    unet = sd_unet()
    before = run(unet)
    adapter = GSPNAdapter.for_unet(torch.compile(unet), keep_attention=["mid_block"])
    assert adapter.config.layers.keys() < self_attentions(unet).keys()
    adapter.mount(unet)
    mounted = run(unet)
    adapter.unmount()
    unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(unet), before, rtol=1e-3, atol=1e-4)
        adapter.mount(torch.compile(unet))
        torch.testing.assert_close(run(unet), mounted, rtol=1e-3, atol=1e-4)
        adapter.unmount()


# ---- what is refused


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mixer": "mamba"}, "mixer must be one of gspn, gspn2, got 'mamba'"),
        ({"init": "zero"}, "init must be one of qkv, random, got 'zero'"),
        ({"proxy": 0.0}, r"proxy must be above 0 and at most 1, got 0\.0"),
        ({"bottleneck": 2.0}, r"bottleneck must be above 0 and at most 1, got 2\.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, or None, got 0"),
        ({"chunk_size": 2.5}, r"chunk_size must be an integer, or None, got 2\.5"),
        ({"chunk_size": True}, "chunk_size must be an integer, or None, got True"),
        ({"proxy": "a"}, "proxy must be a number, got 'a'"),
        ({"keep_attention": "mid_block"}, "keep_attention must be a list of parts of names, got 'mid_block'"),
        ({"keep_attention": ["nothing"]}, "keep_attention: no self-attention name contains 'nothing'"),
        ({"keep_attention": ["attn1"]}, r"keep_attention must leave a self-attention to replace"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GSPNAdapter.for_unet(sd_unet(), **options)


def test_a_pipeline_in_the_place_of_its_unet():
    adapter = GSPNAdapter.for_unet(sd_unet())
    for use in (GSPNAdapter.for_unet, adapter.mount):
        with pytest.raises(TypeError, match="unet must be a UNet2DConditionModel, got a SimpleNamespace; pass pipe"):
            use(SimpleNamespace(unet=sd_unet()))


def test_a_unet_without_self_attention():
    unet = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(ValueError, match="unet must have self-attentions called attn1, UNet2DModel has none"):
        GSPNAdapter.for_unet(unet)


@pytest.mark.parametrize(
    "model,owner,kept",
    [
        ("UNetMotionModel", "AnimateDiffTransformer3D", ["motion_modules"]),
        ("UNet3DConditionModel", "TransformerTemporalModel", ["transformer_in", "temp_attentions"]),
        ("I2VGenXLUNet", "TransformerTemporalModel", ["transformer_in", "temp_attentions", "temporal_encoder"]),
        ("UNetSpatioTemporalConditionModel", "TransformerSpatioTemporalModel", None),
        ("PixArtTransformer2DModel", "PixArtTransformer2DModel", None),
        ("DiTTransformer2DModel", "DiTTransformer2DModel", None),
        ("UVit2DModel", "UVitBlock", None),
    ],
)
def test_what_mixes_other_tokens(model, owner, kept):
    """Over time, or in an order of their own: refused, unless these attentions stay."""
    with torch.device("meta"):
        unet = getattr(diffusers, model)()
        with pytest.raises(
            ValueError, match=rf"attn1 must be within a Transformer2DModel, .* is within {owner}; keep_att"
        ):
            GSPNAdapter.for_unet(unet, init="random")
        if kept:
            layers = GSPNAdapter.for_unet(unet, init="random", keep_attention=kept).config.layers
            assert len(layers) > 10 and not any("temp" in name or "motion" in name for name in layers)


def test_motion_that_stays():
    motion = MotionAdapter(block_out_channels=(16, 32, 32, 32), motion_layers_per_block=1, motion_norm_num_groups=8)
    unet = UNetMotionModel.from_unet2d(sd_unet(), motion).eval()
    values = inputs(unet, n=2)
    values["sample"] = values["sample"].unsqueeze(2).expand(-1, -1, 3, -1, -1)  # (N, C, F, H, W)
    values["encoder_hidden_states"] = values["encoder_hidden_states"].repeat_interleave(3, 0)
    adapter = GSPNAdapter.for_unet(unet, keep_attention=["motion_modules"])
    with torch.no_grad():
        before = unet(**values).sample
        adapter.mount(unet)
        out = unet(**values).sample
        assert out.isfinite().all() and not torch.allclose(out, before)
        adapter.unmount()
        assert torch.equal(unet(**values).sample, before)


def test_processors():
    """Those that compute softmax attention may change, mounted or not; others would be without effect."""

    class Other:
        def __call__(self, *args, **kwargs):
            raise NotImplementedError

    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    expected, name = run(unet), next(iter(adapter.config.layers))
    unet.set_attn_processor(AttnProcessor())
    assert torch.equal(run(unet), run(unet)) and torch.allclose(run(unet), expected, atol=1e-4)
    with pytest.raises(ValueError, match=rf"{name} must be a plain .*, its processor is a Other; .*keep_attention="):
        unet.get_submodule(name).processor = Other()
    adapter.unmount()
    assert type(unet.get_submodule(name).processor) is AttnProcessor
    unet.get_submodule(name).processor = Other()
    for call in (lambda: GSPNAdapter.for_unet(unet), lambda: adapter.mount(unet)):
        with pytest.raises(
            ValueError, match=rf"{name} must be a plain .*, its processor is a Other; .*keep_attention="
        ):
            call()
    assert not mixers(unet)


def test_another_unet():
    adapter = GSPNAdapter.for_unet(sd_unet())
    other = sdxl_unet()
    before = run(other)
    with pytest.raises(ValueError, match=r"the adapter is for another UNet: UNet2DConditionModel has no down_blocks.0"):
        adapter.mount(other)
    wider = sd_unet(block_out_channels=(24, 32, 32, 32))
    with pytest.raises(ValueError, match=r"for another UNet: down_blocks.0.* must be .*16.*, is .*24"):
        adapter.mount(wider)
    assert torch.equal(run(other), before) and not mixers(wider)


def test_wrong_order():
    unet = sd_unet()
    adapter, second = GSPNAdapter.for_unet(unet), GSPNAdapter.for_unet(unet)
    with pytest.raises(ValueError, match="must be mounted to be unmounted"):
        adapter.unmount()
    adapter.mount(unet)
    with pytest.raises(ValueError, match="must be unmounted before it is mounted again"):
        adapter.mount(unet)
    with pytest.raises(ValueError, match="another adapter is mounted on the UNet"):
        second.mount(unet)
    with pytest.raises(ValueError, match="another adapter is mounted on the UNet"):
        GSPNAdapter.for_unet(unet, keep_attention=["down_blocks"])
    del adapter
    unet.gspn_adapter.unmount()
    second.mount(unet)
