"""What timm's own suite asks of a model, over every model registered here."""

from itertools import chain

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from timm.models._hub import save_for_hf
from torch import nn
from vision_cases import TINY, write_images

from gspn_core import SpatialPropagation
from gspn_vision.models import Gspn, checkpoint_filter_fn
from gspn_vision.models.blocks import ExportablePropagation
from gspn_vision.models.published import PUBLISHED
from gspn_vision.profile import profile, table

ALL = timm.list_models("gspn*")
# Models differ in widths and depths alone, so the long tests take the small ones.
MODELS = [name for name in ALL if name.endswith("_nano")]


def make(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_names():
    sizes = ("nano", "tiny", "small", "base")
    assert set(ALL) == {f"{generation}_{size}" for generation in ("gspn", "gspn2") for size in sizes}
    assert len(MODELS) == 2


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sizes(name):
    """Parameters within 3% and multiply-adds, scans included, within 5% of the papers' figures at 224x224."""
    counted = profile(name)
    assert counted.size == (224, 224)
    assert counted.params / 1e6 == pytest.approx(PUBLISHED[name].params, rel=0.03)
    assert counted.macs / 1e9 == pytest.approx(PUBLISHED[name].macs, rel=0.05)


@pytest.mark.parametrize("name", ALL)
def test_every_model_on_meta(name):
    """All of timm's ways to use a backbone, without memory for weights: shapes at a size that is no square."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
        features = timm.create_model(name, features_only=True)
    x = torch.empty(2, 3, 96, 160, device="meta")
    assert model(x).shape == (2, 10)
    assert [tuple(m.shape[2:]) for m in features(x)] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert [m.shape[1] for m in features(x)] == features.feature_info.channels()
    final, maps = model.forward_intermediates(x)
    assert len(maps) == 4
    assert final.shape == (2, model.num_features, 3, 5)
    model.set_grad_checkpointing()
    assert model(x).shape == (2, 10)
    assert model.prune_intermediate_layers([1]) == [1]
    assert model.forward_features(x).shape[1] == model.feature_info[1]["num_chs"]
    groups = group_parameters(model, model.group_matcher())
    assert sorted(chain(*groups.values())) == sorted(key for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_half_precision_of_the_published_models(name):
    """Deep enough for errors to grow, and for activations to leave float16 if the initialisation lets them."""
    model = make(name, num_classes=10).eval()
    x = images(2, 3, 64, 96)
    with torch.inference_mode():
        y = model(x)
        for dtype in (torch.bfloat16, torch.float16):
            narrow = model.to(dtype)(x.to(dtype)).float()
            assert (narrow - y).norm() < 0.04 * y.norm()
            model.float()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (47, 81), (33, 32)])
def test_forward(name, size):
    model = make(name).eval()
    x = images(2, 3, *size)
    y = model(x)
    assert y.shape == (2, 1000)
    assert y.isfinite().all()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, -(-size[0] // 32), -(-size[1] // 32))
    torch.testing.assert_close(model.forward_head(features), y)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    # An image's result does not depend on the others in its batch.
    torch.testing.assert_close(model(x[1:]), y[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=10, drop_path_rate=0.1).train()
    model(images(2, 3, 64, 96)).square().mean().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    # A bias of what is normalised afterwards, or of a value whose gate starts constant, may have none yet.
    zero = {key for key, p in model.named_parameters() if p.grad.abs().max() == 0}
    assert zero == set()


@pytest.mark.parametrize("name", MODELS)
def test_attributes(name):
    model = make(name, num_classes=7, in_chans=1)
    assert (model.num_classes, model.in_chans) == (7, 1)
    assert model.num_features == model.head_hidden_size == model.feature_info[-1]["num_chs"]
    assert model.pretrained_cfg["first_conv"] == "stem.0"
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert model.no_weight_decay() == set()
    assert not model.pretrained_cfg.get("url")
    assert not model.pretrained_cfg.get("hf_hub_id")


@pytest.mark.parametrize("name", MODELS)
def test_pretrained_is_refused_without_weights(name):
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        make(name, pretrained=True)


@pytest.mark.parametrize("name", MODELS)
def test_reset_classifier(name):
    model = make(name)
    x = images(1, 3, 64, 64)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(x).shape == (1, 5)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, model.num_features, 2, 2)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)
    assert make(name, num_classes=0, global_pool="")(x).shape == (1, model.num_features, 2, 2)


@pytest.mark.parametrize("name", MODELS)
def test_reset_classifier_keeps_device_dtype_and_mode(name):
    """Also after a head without classes, which has no parameters to tell."""
    model = make(name, num_classes=10).eval().to("meta", torch.float64)
    for classes, pool in ((0, None), (2, None), (0, ""), (3, "avg")):
        model.reset_classifier(classes, pool)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_features_only(name):
    model = make(name, features_only=True).eval()
    outputs = model(images(1, 3, 96, 64))
    assert [tuple(o.shape) for o in outputs] == [
        (1, channels, 96 // reduction, 64 // reduction)
        for channels, reduction in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    two = make(name, features_only=True, out_indices=(1, 3)).eval()(images(1, 3, 96, 64))
    torch.testing.assert_close(two, [outputs[1], outputs[3]])
    getter = make(name, features_only=True, feature_cls="getter").eval()
    assert isinstance(getter, FeatureGetterNet)
    torch.testing.assert_close(getter(images(1, 3, 96, 64)), outputs)


@pytest.mark.parametrize("name", MODELS)
def test_forward_intermediates(name):
    model = make(name).eval()
    x = images(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    only = model.forward_intermediates(x, indices=2, norm=True, intermediates_only=True)
    torch.testing.assert_close(only, [maps[2], final])
    early, first = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(early, first[0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", MODELS)
def test_prune_intermediate_layers(name):
    x = images(1, 3, 64, 64)
    _, maps = make(name).eval().forward_intermediates(x)
    model = make(name).eval()
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model(x), maps[1])
    assert model.num_features == model.head_hidden_size == maps[1].shape[1]
    model = make(name).eval()
    logits = model(x)
    model.prune_intermediate_layers([3], prune_head=False)
    torch.testing.assert_close(model(x), logits)


@pytest.mark.parametrize("name", MODELS)
def test_group_matcher(name):
    model = make(name)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse))
        assert sorted(chain(*groups.values())) == sorted(key for key, _ in model.named_parameters())
        assert any(key.startswith("stem") for key in groups[0])
        assert any(key.startswith("head") for key in groups[max(groups)])
        # The stem, every stage or block, and the head; a downsampling belongs to the block after it.
        blocks = len(model.stages) if coarse else sum(len(stage.blocks) for stage in model.stages)
        assert len(groups) == blocks + 2


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_does_not_change_gradients(name):
    x = images(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = make(name, num_classes=4).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # annotations within __init__
def test_torchscript(name):
    model = make(name).eval()
    script = torch.jit.script(model)
    for size in ((64, 64), (32, 40)):
        x = images(1, 3, *size)
        torch.testing.assert_close(script(x), model(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["getter", "fx"])
def test_torchscript_of_features(name, kind):
    """`forward_intermediates` is scripted with the getter, a graph of torch.fx with the other."""
    model = timm.create_model(name, features_only=True, feature_cls=kind, out_indices=(0, 2)).eval()
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(torch.jit.script(model)(x), model(x), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", MODELS)
def test_fx(name):
    model = make(name, **TINY).eval()
    graph = torch.fx.symbolic_trace(model)
    x = images(1, 3, 64, 40)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_compile(name):
    torch._dynamo.reset()
    model = make(name, num_classes=3, **TINY)
    x = images(2, 3, 32, 48)
    expected = model(x)
    # The graphs of forward and backward, without code generation, which would take minutes on a small machine.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(x).sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_export(name):
    model = make(name, num_classes=3, **TINY).eval()
    program = torch.export.export(model, (images(2, 3, 64, 48),), dynamic_shapes=({0: torch.export.Dim("n")},))
    x = images(3, 3, 64, 48)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_device_and_dtype_reach_every_tensor(name):
    model = make(name, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}
    assert model(torch.empty(2, 3, 64, 64, device="meta", dtype=torch.bfloat16)).shape == (2, 1000)
    model.to_empty(device="cpu").init_weights()
    assert all(t.isfinite().all() for t in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    model = make(name, num_classes=10).eval()
    x = images(1, 3, 64, 64)
    y = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model.float()(x), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_float16(name):
    model = make(name).eval()
    x = images(2, 3, 64, 64)
    expected = model(x)
    y = model.half()(x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("kind", [{"proxy_channels": 2}, {"weight_groups": 4}])
def test_the_exportable_propagation_is_the_same(kind, chunk_size):
    ours = SpatialPropagation(4, chunk_size=chunk_size, **kind)
    plain = ExportablePropagation(4, chunk_size=chunk_size, **kind)
    plain.load_state_dict(ours.state_dict())
    for size in ((5, 7), (1, 4), (6, 1)):
        x = images(2, 4, *size)
        torch.testing.assert_close(plain(x), ours(x))


def test_images_that_do_not_fit_are_refused():
    """As timm's own convolutional models do: by the layer that meets them."""
    model = make("gspn2_nano")
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 4 channels"):
        model(images(1, 4, 64, 64))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(make("gspn2_nano", num_classes=10).state_dict())


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_with_timms_loader(tmp_path):  # timm leaves the files of images to the garbage collector
    """timm's data set, loader and preprocessing, as its own validation script puts them together."""
    write_images(tmp_path, {"left": 3, "right": 3})
    model = make("gspn2_nano", num_classes=2).eval()
    options = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    dataset = create_dataset("", root=str(tmp_path), split="val")
    names = ("input_size", "mean", "std", "interpolation", "crop_pct")
    loader = create_loader(
        dataset, batch_size=4, use_prefetcher=False, num_workers=0, **{name: options[name] for name in names}
    )
    batches = [(model(x), y) for x, y in loader]
    assert [len(logits) for logits, _ in batches] == [4, 2]
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    assert options["mean"] == model.pretrained_cfg["mean"]


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name):
    source = make(name)
    torch.manual_seed(9)
    target = timm.create_model(name)
    x = images(1, 3, 64, 64)
    assert not torch.equal(source.eval()(x), target.eval()(x))
    wrapped = {"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}
    target.load_state_dict(checkpoint_filter_fn(wrapped, target))
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("name", MODELS)
def test_unknown_keywords_are_refused(name):
    with pytest.raises(TypeError, match="windows"):
        make(name, windows=7)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stem_stride(stride):
    model = make("gspn2_nano", stem_stride=stride)
    maps = model.forward_intermediates(images(1, 3, 32, 64), intermediates_only=True)
    assert [tuple(m.shape[-2:]) for m in maps] == [
        (32 // info["reduction"], 64 // info["reduction"]) for info in model.feature_info
    ]
    assert model.feature_info[0]["reduction"] == stride


def test_bad_arguments():
    with pytest.raises(ValueError, match="stem_stride must be 1, 2 or 4, got 3"):
        Gspn(stem_stride=3)
    with pytest.raises(ValueError, match="one entry per stage"):
        Gspn(widths=(8, 16))


def test_the_two_kinds_of_propagation():
    for name, proxy in (("gspn_nano", None), ("gspn2_nano", 2)):
        layers = [m for m in make(name).modules() if isinstance(m, SpatialPropagation)]
        assert [layer.chunk_size for layer in layers] == [2, 2, None, None, None]
        assert {layer.proxy_channels for layer in layers} == {proxy}
        assert all(layer.weight_groups == (layer.channels if proxy is None else 1) for layer in layers)


def test_a_distant_pixel_is_seen():
    """Stages 3 and 4 scan the whole map: a change in one corner reaches the opposite one."""
    model = make("gspn2_nano").double().eval()
    x = images(1, 3, 128, 128).double()
    changed = x.clone()
    changed[..., :4, :4] += 1
    difference = model.forward_features(changed) - model.forward_features(x)
    assert difference[..., -1, -1].abs().max() > 1e-8


# ---- counting


def test_profile_counts_by_hand():
    """A stem of two convolutions, one block, and the head, by the formulas."""
    options = {"widths": (8, 8), "depths": (1, 0), "chunk_sizes": (None, None), "gate_rank": 2, "num_classes": 5}
    counted = profile("gspn_nano", (32, 32), **options)
    inner, pixels = 12, 8 * 8
    stem = 16 * 16 * 4 * 27 + pixels * 8 * 36
    mixer = (
        8 * inner + 49 * inner + 2 * inner + 2 * 20 * inner + inner * 8
    )  # in, 7x7, bottleneck, 12 + 4 + 4 gates, out
    scan = 4 * inner * 5
    ffn = 2 * 8 * 32
    down = 4 * 4 * 8 * 8 * 9
    assert counted.macs == stem + pixels * (mixer + scan + ffn) + down + 8 * 5


def test_profile_of_other_models_and_errors():
    text = table([profile("gspn_tiny"), profile("resnet18", (64, 64))])
    assert "30M, 5.3G (GSPN)" in text
    assert "11.69M" in text
    with pytest.raises(ValueError, match="resnet0"):
        profile("resnet0")
    with pytest.raises(ValueError, match="does not take images of 100x100"):
        profile("deit_small_patch16_224", (100, 100))


# ---- the Hugging Face hub, without a network: what is pushed is a folder, and timm loads folders the same way


@pytest.mark.parametrize("name", MODELS)
def test_saved_for_the_hub_and_loaded_again(name, tmp_path):
    model = make(name, num_classes=7).eval()
    save_for_hf(
        model,
        tmp_path,
        safe_serialization=True,
        model_config={"num_classes": 7, "label_names": [f"class {i}" for i in range(7)]},
    )
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    other_head = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert other_head(x).shape == (1, 3)
    assert torch.equal(other_head.stem[0].weight, model.stem[0].weight)
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    torch.testing.assert_close(grey.stem[0].weight[:, 0], model.stem[0].weight.sum(1))
