"""Mounting and unmounting, grids, saving, and the company of diffusers' other features."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from t2i_cases import UNETS, inputs, run, sd_unet, sdxl_unet

from gspn_t2i import GSPNAdapter, SelfAttentionMixer
from gspn_t2i.adapter import self_attentions

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
    adapter.mount(unet)
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
    kept = [name for name, module in self_attentions(unet).items() if not isinstance(module, SelfAttentionMixer)]
    assert kept and all("mid_block" in name or "up_blocks.3" in name for name in kept)
    run(unet)


# ---- grids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(8, 24), (16, 8), (12, 20)])
def test_height_and_width_are_the_real_ones(family, size):
    """At every level the mixers' grid is the map's, although several grids have as many tokens."""
    unet = UNETS[family]()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    seen = {}

    def note(name):
        return lambda module, args, kwargs: seen.__setitem__(name, tuple((args[0]).shape[-2:]))

    names = {name.rpartition(".transformer_blocks.")[0] for name in self_attentions(unet)}
    for name in names:
        unet.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
    out = run(unet, height=size[0], width=size[1])
    assert out.shape == (2, 4, *size)
    for name, module in self_attentions(unet).items():
        assert module.grid == seen[name.rpartition(".transformer_blocks.")[0]]
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


def test_a_copy_has_its_own_mixers():
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    expected = run(unet)
    other = copy.deepcopy(unet)
    run(other, height=16, width=16)
    assert mixers(unet)[0].grid == (8, 8)
    assert mixers(other)[0].grid == (16, 16)
    assert torch.equal(run(unet), expected) and torch.equal(run(other), expected)


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
    options = ("layers", "mixer", "proxy", "bottleneck", "chunk_size")
    assert [loaded.config[name] for name in options] == [adapter.config[name] for name in options]
    loaded.mount(unet)
    assert torch.equal(run(unet), expected)
    unet_parameters = sum(p.numel() for p in UNETS[family]().parameters())
    assert sum(p.numel() for p in loaded.parameters()) < unet_parameters


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
    unet = sd_unet()
    before = run(unet)
    originals = {key: value.clone() for key, value in unet.state_dict().items() if "attn1" in key}
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    expected = run(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert mixers(unet)[0].to_q.weight.dtype == torch.bfloat16
    assert (run(unet) - expected).norm() < 0.05 * expected.norm()
    adapter.unmount()
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in originals.items())
    assert (run(unet) - before).norm() < 0.05 * before.norm()


def test_gradient_checkpointing():
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    adapter.mount(unet)
    unet.requires_grad_(False)
    adapter.requires_grad_(True)
    gradients = []
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        unet.train()
        unet(**inputs(unet)).sample.square().sum().backward()
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


# ---- what is refused


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mixer": "mamba"}, "mixer must be one of gspn, gspn2, got 'mamba'"),
        ({"init": "zero"}, "init must be one of qkv, random, got 'zero'"),
        ({"proxy": 0.0}, r"proxy must be above 0 and at most 1, got 0\.0"),
        ({"bottleneck": 2.0}, r"bottleneck must be above 0 and at most 1, got 2\.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, or None, got 0"),
        ({"keep_attention": ["nothing"]}, "keep_attention: no self-attention name contains 'nothing'"),
        ({"keep_attention": ["attn1"]}, r"keep_attention must leave a self-attention to replace"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        GSPNAdapter.for_unet(sd_unet(), **options)


def test_a_unet_without_self_attention():
    unet = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(ValueError, match="unet must have self-attentions called attn1, UNet2DModel has none"):
        GSPNAdapter.for_unet(unet)


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
