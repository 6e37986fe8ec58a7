"""Vision transformers whose attention is replaced: `gspn_vision.convert`."""

import copy
import io
import json
import threading
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

import gspn_vision
from gspn_core import propagate
from gspn_vision import checkpoint
from gspn_vision.cli import main
from gspn_vision.data import Preprocessing
from gspn_vision.export import export
from gspn_vision.foundation import CompressedPropagation, blocks, convert, kept_blocks, mixers
from gspn_vision.foundation.grid import current_grid
from gspn_vision.models import build_model
from gspn_vision.visualize import heat_maps, layers

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "img_size": (16, 24), "patch_size": 4}
HALF = (0.5, 0.5, 0.5)
LOOKS = Preprocessing(in_chans=3, size=(16, 24), mean=HALF, std=HALF, interpolation="bicubic", crop_pct=1)
# name, further arguments, prefix tokens
BASES = {
    "vit": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 1),
    "vit_average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "qk_norm": True}, 0),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}, 2),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"no_embed_class": True}, 5),
    "dinov3": ("vit_small_patch16_dinov3", {}, 5),
    "eva02": ("eva02_tiny_patch14_224", {}, 1),
    "siglip": ("vit_base_patch16_siglip_224", {}, 0),
    "beit": ("beit_base_patch16_224", {}, 1),
    "post_norm": ("vit_relpos_small_patch16_224", {}, 0),
}


def small(base: str = "vit", **kwargs: object) -> nn.Module:
    name, own, _ = BASES[base]
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **own, **kwargs}).eval()


def images(n: int = 2, h: int = 16, w: int = 24) -> Tensor:
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(1))


def mixer_of(tokens: int, **kwargs: object) -> CompressedPropagation:
    torch.manual_seed(0)
    return CompressedPropagation(32, **{"prefix_tokens": tokens, "num_heads": 2, **kwargs}).double()


def test_without_prefix_tokens_the_mixer_is_the_papers() -> None:
    mixer = mixer_of(0, weight_groups=4)
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    z = F.linear(x, mixer.down.weight, mixer.down.bias).transpose(1, 2).reshape(2, 8, 3, 4)
    v, logits, lam, u = mixer.propagation.project(z)
    y = propagate(v, logits, lam, u).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixer(x, grid=(3, 4)), F.linear(y, mixer.up.weight, mixer.up.bias))
    assert {name.split(".")[0] for name, _ in mixer.named_parameters()} == {"down", "propagation", "up"}


def test_prefix_tokens_read_as_multi_head_attention_does() -> None:
    mixer = mixer_of(3)
    x = torch.randn(2, 3 + 12, 32, dtype=torch.float64)
    attention = nn.MultiheadAttention(32, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([mixer.q.weight, mixer.k.weight, mixer.v.weight]))
        mixer.q.bias.normal_()
        mixer.v.bias.normal_()
        attention.in_proj_bias.copy_(torch.cat([mixer.q.bias, torch.ones(32), mixer.v.bias]))
    attention.out_proj.load_state_dict(mixer.out.state_dict())
    expected = attention(x[:, :3], x, x, need_weights=False)[0]
    torch.testing.assert_close(mixer(x, grid=(3, 4))[:, :3], expected)


@pytest.mark.parametrize("prefix", ["attend", "drop"])
def test_who_reads_whom(prefix: str) -> None:
    mixer = mixer_of(2, prefix=prefix)
    x = torch.randn(1, 2 + 12, 32, dtype=torch.float64)

    def reads(reader: slice, read: slice) -> bool:
        changed = x.clone()
        changed[:, read] += 1 + torch.randn_like(changed[:, read])
        return not torch.equal(mixer(changed, grid=(3, 4))[:, reader], mixer(x, grid=(3, 4))[:, reader])

    prefixes, image = slice(0, 2), slice(2, None)
    attends = prefix == "attend"
    assert [reads(prefixes, image), reads(image, prefixes), reads(prefixes, slice(1, 2))] == [attends] * 3
    assert reads(image, image)
    assert attends or not mixer(x, grid=(3, 4))[:, :2].any()


@pytest.mark.parametrize("side", [4, 64])
def test_a_fresh_mixer_neither_explodes_nor_vanishes(side: int) -> None:
    torch.manual_seed(0)
    mixer = CompressedPropagation(384, prefix_tokens=1, num_heads=6)
    out = mixer(torch.randn(2, 1 + side * side, 384), grid=(side, side))
    assert 0.02 < out[:, :1].std() < 3 and 0.02 < out[:, 1:].std() < 3


@pytest.mark.parametrize(
    ("latent", "groups", "dim", "channels"),
    [(1 / 18, 1, 1152, 64), (1 / 18, 1, 192, 16), (0.01, 1, 32, 8), (1 / 18, 3, 192, 18), (12, 4, 192, 12)],
)
def test_latent_channels(latent: float, groups: int, dim: int, channels: int) -> None:
    assert CompressedPropagation(dim, latent=latent, weight_groups=groups).down.out_features == channels


@pytest.mark.parametrize(
    "wrong",
    [{"latent": 0}, {"latent": 1.5}, {"weight_groups": 0}, {"prefix": "keep"}, {"num_heads": 5}],
)
def test_a_mixer_names_a_wrong_argument(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CompressedPropagation(32, **wrong)


@pytest.mark.parametrize(
    ("keep", "depth", "kept"),
    [
        ((), 4, set()),
        ([1, -1], 12, {1, 11}),
        ("every 6", 24, {5, 11, 17, 23}),
        (1 / 6, 24, {5, 11, 17, 23}),
        (1 / 9, 27, {8, 17, 26}),
        (0, 5, set()),
        (1.0, 3, {0, 1, 2}),
    ],
)
def test_kept_blocks(keep: object, depth: int, kept: set) -> None:
    assert kept_blocks(keep, depth) == kept


@pytest.mark.parametrize("keep", [[12], [-13], 2.0, "every 0", "each 2", [True], ["1"]])
def test_wrong_keep(keep: object) -> None:
    with pytest.raises(ValueError, match="keep must be"):
        kept_blocks(keep, 12)


@pytest.mark.parametrize("base", BASES)
def test_convert_replaces_attention_of(base: str) -> None:
    original = small(base)
    model = convert(copy.deepcopy(original), keep=[-1], weight_groups=2)
    x, depth = images(), SMALL["depth"]
    assert list(mixers(model)) == [f"blocks.{i}.attn" for i in range(depth - 1)]
    assert all(mixer.prefix_tokens == BASES[base][2] for mixer in mixers(model).values())
    others = {k: v for k, v in model.state_dict().items() if ".attn." not in k}
    torch.testing.assert_close(others, {k: v for k, v in original.state_dict().items() if ".attn." not in k})
    out = model(x)
    assert out.shape == (2, 5) and not torch.equal(out, original(x))
    out.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and "mask_token" not in name] == []
    kept = convert(copy.deepcopy(original), keep=1.0)
    assert torch.equal(kept(x), original(x)) and not mixers(kept)


@pytest.mark.parametrize("base", ["vit", "deit_distilled", "dinov2", "dinov3", "eva02"])
def test_prefix_tokens_read_as_before(base: str) -> None:
    """By the projections of the attention: of the last two without their rotations, as it is called here."""
    original = small(base)
    attention, tokens = original.blocks[0].attn, BASES[base][2]
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    mixer = convert(copy.deepcopy(original)).blocks[0].attn
    x = torch.randn(2, tokens + 24, 32)
    torch.testing.assert_close(mixer(x, grid=(4, 6))[:, :tokens], attention(x)[:, :tokens], rtol=1e-4, atol=1e-5)


def test_projections_with_norms_between_them_are_not_copied() -> None:
    for changed in ({"qk_norm": True}, {"attn_layer": "diff"}):
        original = small(**changed)
        mixer = convert(copy.deepcopy(original)).blocks[0].attn
        weight = next(m for m in original.blocks[0].attn.modules() if isinstance(m, nn.Linear)).weight
        assert not torch.equal(mixer.q.weight, weight[:32])


@pytest.mark.parametrize("base", ["vit", "eva02"])
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (8, 48), (40, 12)])
def test_the_grid_is_that_of_the_call(base: str, size: tuple[int, int]) -> None:
    model = convert(small(base, dynamic_img_size=True))
    seen = []
    for mixer in mixers(model).values():
        mixer.propagation.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    model(images(1, *size))
    assert seen == [(size[0] // 4, size[1] // 4)] * 3
    with pytest.raises(RuntimeError, match="grid"):
        current_grid()


def test_a_padded_grid_counts_the_padding() -> None:
    model = convert(small(dynamic_img_pad=True))
    assert model.forward_features(images(1, 14, 23)).shape == (1, 1 + 4 * 6, 32)


def test_threads_do_not_see_each_others_grids() -> None:
    model = convert(small())
    sizes = [(16, 24), (24, 16), (8, 48), (48, 8)]  # as many tokens each
    expected = [model(images(1, *size)) for size in sizes]
    got: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(len(sizes))

    def work(i: int) -> None:
        barrier.wait()
        got[i] = [model(images(1, *sizes[i])) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i, outs in got.items():
        assert len(outs) == 5
        torch.testing.assert_close(outs, [expected[i]] * 5)


@pytest.mark.parametrize("base", ["vit", "eva02", "beit"])
def test_gradient_checkpointing_recomputes_on_the_grid_of_its_call(base: str) -> None:
    model = convert(small(base, **({} if base == "beit" else {"dynamic_img_size": True})))
    sizes = [(16, 24)] if base == "beit" else [(16, 24), (24, 16)]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = sum(model(images(2, *size)).square().sum() for size in sizes)
        thread = threading.Thread(target=loss.backward)  # as on an accelerator
        thread.start()
        thread.join()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    calls = []
    mixer = next(iter(mixers(model).values()))
    mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), plain)
    assert len(calls) == 2 * len(sizes)  # it did recompute
    assert len(plain) > 30


def test_checkpointing_that_was_on_stays_on() -> None:
    model = small()
    model.set_grad_checkpointing()
    convert(model)
    assert all(block.recompute for block in model.blocks) and not model.grad_checkpointing


def test_copies_and_pickles_compute_the_same() -> None:
    model, x = convert(small(), keep=[0]), images()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
    assert isinstance(model, timm.models.VisionTransformer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet18"), "nothing to replace"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "nothing to replace"),
        (lambda: timm.create_model("test_vit4", patch_drop_rate=0.1), "patch_drop_rate"),
        (lambda: timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=32, num_heads=2), "NaFlex"),
        (lambda: convert(timm.create_model("test_vit")), "before"),
        (lambda: torch.compile(timm.create_model("test_vit")), "compile"),
    ],
)
def test_what_cannot_be_converted_is_refused(model: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(model())


def test_only_modules_are_converted() -> None:
    with pytest.raises(TypeError, match="timm model"):
        convert("vit")


def test_masks_and_tokens_off_the_grid_are_refused() -> None:
    model = convert(small())
    with pytest.raises(ValueError, match="attn_mask"):
        model.forward_features(images(), attn_mask=torch.ones(25, 25, dtype=torch.bool))
    with pytest.raises(ValueError, match="grid of 2x3"):
        next(iter(mixers(model).values()))(torch.randn(1, 8, 32), grid=(2, 3))
    model.patch_drop = PatchDropout(0.5)
    with pytest.raises(ValueError, match="grid of 4x6"):
        model.train()(images())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break_for_any_size(checkpointing: bool) -> None:
    model = convert(small("vit", depth=1))
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((16, 24), (24, 40)):
        torch.testing.assert_close(compiled(images(2, *size)), model(images(2, *size)))
        compiled(images(2, *size)).sum().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = small("dinov2").to(dtype)
    assert {p.dtype for p in convert(model).parameters()} == {dtype}
    out = model(images().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), model.float()(images()), rtol=0.1, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convert(small("eva02"))(images()).isfinite().all()


def test_exports_to_onnx(tmp_path: Path) -> None:
    model = convert(small("eva02", depth=2), keep=[0])
    assert export(model, tmp_path / "m.onnx", input_size=(3, 16, 24)).difference is not None


def test_exports_for_torch_with_open_sizes(tmp_path: Path) -> None:
    model = convert(small(depth=1, dynamic_img_pad=True))
    done = export(model, tmp_path / "m.pt2", input_size=(3, 16, 24), format="torch", batch=2, dynamic_size=True)
    assert done.difference is not None


def saved(model: nn.Module, folder: Path, kwargs: dict) -> None:
    config = checkpoint.timm_config(model, kwargs, list("abcde"), LOOKS)
    checkpoint.write_model(folder, config, model.state_dict())


def test_saves_and_loads_as_a_timm_folder(tmp_path: Path) -> None:
    kwargs = {**SMALL, "base": "vit_tiny_patch16_224", "keep": [-1], "weight_groups": 2, "prefix": "drop"}
    model = build_model("cgspn", kwargs).eval()
    saved(model, tmp_path / "model", kwargs)
    out = model(images())
    for again in (
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval(),
        checkpoint.load_model(tmp_path / "model").model,
    ):
        assert len(mixers(again)) == 2
        assert torch.equal(again(images()), out)
    other = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=7).eval()
    assert torch.equal(other.forward_features(images()), model.forward_features(images()))


def test_pretrained_weights_are_the_bases(tmp_path: Path) -> None:
    original = small("vit", patch_size=16)
    torch.save(original.state_dict(), tmp_path / "base.pth")
    kwargs = {**SMALL, "patch_size": 16, "dynamic_img_size": True, "base": "vit_tiny_patch16_224"}
    overlay = {"file": str(tmp_path / "base.pth"), "num_classes": 5}
    model = timm.create_model("cgspn", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert torch.equal(model.patch_embed.proj.weight, original.patch_embed.proj.weight)
    assert torch.equal(model.head.weight, original.head.weight) and len(mixers(model)) == 3


def test_features_of_the_registered_model() -> None:
    kwargs = {**SMALL, "base": "vit_tiny_patch16_224", "keep": [1]}
    features = timm.create_model("cgspn", features_only=True, out_indices=[0, 1], **kwargs)
    assert [tuple(f.shape) for f in features(images())] == [(2, 32, 4, 6)] * 2
    assert list(mixers(features)) == ["model.blocks.0.attn"]


def test_the_command_converts_a_folder_and_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = build_model("vit_tiny_patch16_224", SMALL).eval()
    saved(original, tmp_path / "base", SMALL)
    out = str(tmp_path / "converted")
    command = [
        "convert",
        "--checkpoint",
        str(tmp_path / "base"),
        "--keep",
        "every",
        "3",
        "--mixer-kwargs",
        '{"latent": 12}',
    ]
    assert main([*command, "--out", out]) == 0
    assert "blocks.0.attn, blocks.1.attn" in capsys.readouterr().out
    loaded = checkpoint.load_model(out)
    assert list(mixers(loaded.model)) == ["blocks.0.attn", "blocks.1.attn"] and loaded.class_names == list("abcde")
    assert loaded.model.blocks[0].attn.down.out_features == 12
    assert torch.equal(loaded.model.blocks[2].attn.qkv.weight, original.blocks[2].attn.qkv.weight)
    assert main(["convert", "--checkpoint", out, "--out", str(tmp_path / "twice")]) == 2
    assert "converted before" in capsys.readouterr().err
    named = tmp_path / "named"
    assert main(["convert", "--model", "test_vit", "--keep", "0", "-1", "--out", str(named), "--json"]) == 0
    assert len(mixers(checkpoint.load_model(named).model)) == len(json.loads(capsys.readouterr().out)["replaced"])


def test_blocks_and_mixers_have_the_originals_names() -> None:
    original = small()
    model = gspn_vision.convert(copy.deepcopy(original))
    assert list(blocks(model)) == list(blocks(original)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(isinstance(original.get_submodule(name), nn.Module) for name in mixers(model))


def test_heat_maps_of_a_converted_model() -> None:
    from PIL import Image

    model = convert(small())
    assert list(layers(model)) == [f"blocks.{i}.attn.propagation" for i in range(3)]
    maps = heat_maps(model, LOOKS, Image.new("RGB", (48, 32), "teal"), pixel=(16, 8), size=(32, 48)).maps
    assert maps.shape == (4, 8, 12) and maps.isfinite().all() and (maps > 0).any()


@pytest.mark.parametrize("name", ["cait_xxs24_224", "samvit_base_patch16", "convit_tiny"])
def test_models_whose_blocks_get_no_grid_stay_as_they_are(name: str) -> None:
    kwargs = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    size = {"img_size": 64} if name == "samvit_base_patch16" else {"img_size": 32, "patch_size": 8}
    model = timm.create_model(name, **kwargs, **size).eval()
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match="model must"):
        convert(model)
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    side = 64 if name == "samvit_base_patch16" else 32
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 3)


def test_beit_takes_another_size() -> None:
    model = convert(small("beit"))
    model.set_input_size(img_size=(24, 32))
    assert model(torch.zeros(1, 3, 24, 32)).shape[0] == 1


def test_the_folder_loads_at_another_size_by_timm(tmp_path: Path) -> None:
    kwargs = {**SMALL, "base": "vit_tiny_patch16_224"}
    saved(timm.create_model("cgspn", **kwargs), tmp_path / "c", kwargs)
    model = timm.create_model(f"local-dir:{tmp_path}/c", pretrained=True, img_size=(32, 48))
    assert model(torch.zeros(1, 3, 32, 48)).shape[0] == 1


def test_convert_replaces_nothing_but_timm_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was there stays: a file, a folder of other files, a run."""
    (tmp_path / "run.py").write_text("print()")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    command = ["convert", "--model", "vit_tiny_patch16_224", f"--model-kwargs={json.dumps(SMALL)}", "--out"]
    for name, message in (("run.py", "out must name a folder"), ("folder", "would be replaced and holds sub")):
        assert main([*command, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "run.py").read_text() == "print()" and (tmp_path / "folder" / "sub").is_dir()
    for _ in range(2):  # a model of before may be replaced
        assert main([*command, str(tmp_path / "new")]) == 0
    assert main([*command, str(tmp_path / "new"), "--keep", "0", "1", "2"]) == 2
    assert "keep must leave a block without attention" in capsys.readouterr().err
