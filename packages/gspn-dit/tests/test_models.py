"""The denoiser: sizes, arithmetic against a plain implementation, and what diffusers asks of a model."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from dit_cases import SHAPE, inputs, tiny_model
from plain import plain_forward
from torch import nn

from gspn_dit import PRESETS, GSPNDiTTransformer2DModel
from gspn_dit.models import DropPath

MIXERS = [None, 4]  # GSPN-1 and GSPN-2


# ---- sizes


@pytest.mark.parametrize("name,published", [("GSPN-B/2", 137), ("GSPN-L/2", 443), ("GSPN-XL/2", 690)])
def test_parameters_are_those_published(name, published):
    with torch.device("meta"):
        model = GSPNDiTTransformer2DModel.from_preset(name)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions / published - 1) < 0.01
    assert len(model.in_blocks) + 1 + len(model.out_blocks) == PRESETS[name]["num_layers"] + 1


def test_presets():
    assert len(PRESETS) == 16
    with torch.device("meta"):
        model = GSPNDiTTransformer2DModel.from_preset("GSPN2-L/4", num_classes=7)
    assert model.middle_block.propagation.proxy_channels == 150
    assert model.middle_block.propagation.weight_groups == 1
    assert (model.config.patch_size, model.config.num_classes) == (4, 7)
    with pytest.raises(ValueError, match=r"model must be one of GSPN-S/2, .*, got 'GSPN-M/2'"):
        GSPNDiTTransformer2DModel.from_preset("GSPN-M/2")
    with pytest.raises(TypeError, match="nonsense"):
        GSPNDiTTransformer2DModel.from_preset("GSPN-S/2", nonsense=1)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_layers": 3}, "num_layers must be even"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"patch_size": 2.0}, "patch_size must be an integer of at least 1, got 2.0"),
    ],
)
def test_wrong_shapes_of_the_model(changes, message):
    with pytest.raises(ValueError, match=message):
        GSPNDiTTransformer2DModel(**{**SHAPE, **changes})


# ---- arithmetic


@pytest.mark.parametrize("proxy", MIXERS)
@pytest.mark.parametrize("size,patch", [((8, 8), 2), ((4, 12), 4), ((6, 10), 1)])
def test_forward_is_the_plain_one(proxy, size, patch):
    model = tiny_model(proxy_channels=proxy, patch_size=patch, num_layers=4)
    x, t, labels = inputs(height=size[0], width=size[1])
    ours = model(x, t, labels).sample
    assert ours.shape == (2, 8, *size)
    weights = {name: p.double() for name, p in model.state_dict().items()}
    expected = plain_forward(weights, model.config, x.double(), t, labels)
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("proxy", MIXERS)
def test_every_parameter_learns(proxy):
    model = tiny_model(proxy_channels=proxy).train()
    x, t, _ = inputs(n=6)
    model(x, t, torch.arange(6)).sample.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_starts_at_zero():
    x, t, labels = inputs()
    model = GSPNDiTTransformer2DModel(**SHAPE)
    assert torch.equal(model(x, t, labels).sample, torch.zeros(2, 8, 8, 8))
    assert model.middle_block.proj_in.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


def test_drop_path_is_linear_in_depth():
    model = GSPNDiTTransformer2DModel(**{**SHAPE, "num_layers": 4, "drop_path_rate": 0.4})
    blocks = [*model.in_blocks, model.middle_block, *model.out_blocks]
    assert [1 - block.drop_path.keep.item() for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match=r"drop_path_rate must be at least 0 and below 1, got 1\.0"):
        GSPNDiTTransformer2DModel(**{**SHAPE, "drop_path_rate": 1.0})


def test_drop_path_leaves_branches_out_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, y = DropPath(0.25), torch.ones(20_000, 2, 1, 1)
    out = layer(y)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(out[:, 0], out[:, 1])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert layer.eval()(y) is y


def test_times_and_classes():
    model = tiny_model()
    x, _, labels = inputs()
    one = model(x, torch.tensor([7, 7]), labels).sample
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        assert torch.equal(model(x, t, labels).sample, one)
    assert not torch.equal(model(x, 7.5, labels).sample, one)
    null = model(x, 7, torch.tensor([5, 5])).sample
    assert torch.equal(model(x, 7, torch.tensor([1000, 1000])).sample, null)
    assert not torch.equal(null, one)
    assert torch.equal(model(x, 7, labels, return_dict=False)[0], one)


@pytest.mark.parametrize(
    "shape,message",
    [
        ((2, 3, 8, 8), r"hidden_states must be \(N, 4, H, W\), got \(2, 3, 8, 8\)"),
        ((4, 8, 8), r"must be \(N, 4, H, W\), got \(4, 8, 8\)"),
        ((2, 4, 8, 7), "height and width must be multiples of 2, got 8 x 7"),
    ],
)
def test_wrong_latents(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(shape), 0, torch.zeros(2, dtype=torch.long))


# ---- diffusers


@pytest.mark.parametrize("proxy", MIXERS)
def test_save_and_load(proxy, tmp_path):
    model = tiny_model(proxy_channels=proxy)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["out_channels"] == 8
    loaded = GSPNDiTTransformer2DModel.from_pretrained(tmp_path)
    arguments = inputs()
    assert torch.equal(loaded(*arguments).sample, model(*arguments).sample)
    half = GSPNDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    out = half(arguments[0].bfloat16(), *arguments[1:]).sample
    assert out.dtype == torch.bfloat16
    assert (out.float() - model(*arguments).sample).abs().max() < 0.1


@pytest.mark.parametrize("proxy", MIXERS)
def test_gradient_checkpointing_changes_nothing(proxy):
    model = tiny_model(proxy_channels=proxy).train()
    other = copy.deepcopy(model)
    other.enable_gradient_checkpointing()
    assert other.is_gradient_checkpointing
    arguments = inputs()
    for m in (model, other):
        m(*arguments).sample.square().sum().backward()
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# Of torch's own, where a block is compiled whose input is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compile():
    model = tiny_model()
    arguments = inputs()
    expected = model(*arguments).sample
    whole = torch.compile(copy.deepcopy(model), fullgraph=True)
    torch.testing.assert_close(whole(*arguments).sample, expected, rtol=1e-4, atol=1e-5)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(model(*arguments).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_blocks_of_any_rate_and_place_share_their_graphs():
    """A graph for blocks and one for out-blocks, whatever their number and their DropPath rates."""
    torch._dynamo.reset()  # what other tests compiled
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    model = tiny_model(num_layers=6, drop_path_rate=0.3).train()
    model.compile_repeated_blocks(backend=count, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        model(*inputs()).sample.sum().backward()
    assert len(graphs) == 2


def test_layerwise_casting_keeps_norms_and_embeddings():
    model = tiny_model()
    arguments = inputs()
    expected = model(*arguments).sample
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.middle_block.mix.weight.dtype == torch.bfloat16
    assert model.middle_block.norm.weight.dtype == model.patch_embed.weight.dtype == torch.float32
    assert (model(*arguments).sample - expected).abs().max() < 0.1


@pytest.fixture
def vae():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16)


def test_the_pipeline_of_diffusers(vae, tmp_path):
    """DiTPipeline asks with null class 1000, drops the learned variance, and reloads the model by its class."""
    pipeline = DiTPipeline(transformer=tiny_model(), vae=vae, scheduler=DDIMScheduler(), id2label={"0": "cat, feline"})
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}

    def draw(pipeline):
        return pipeline([0, 3], generator=torch.Generator().manual_seed(0), **options).images

    images = draw(pipeline)
    assert images.shape == (2, 16, 16, 3)
    pipeline.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.transformer, GSPNDiTTransformer2DModel)
    assert (draw(again) == images).all()
    assert pipeline.get_label_ids(["feline"]) == [0]


def test_no_module_is_named_like_a_pipeline_of_diffusers():
    import pkgutil

    import diffusers.pipelines

    import gspn_dit

    taken = {module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__)}
    assert not taken & {module.name for module in pkgutil.iter_modules(gspn_dit.__path__)}


def test_layers_are_the_fields_own():
    block = tiny_model().out_blocks[0]
    assert isinstance(block.fuse, nn.Conv2d) and block.fuse.weight.shape == (32, 64, 1, 1)
    assert block.conv.weight.shape == (32, 1, 7, 7) and block.conv.bias is None
