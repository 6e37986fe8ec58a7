"""The adapter in pipelines of diffusers: text to image, image to image, inpainting, ControlNet, LoRA, offloading."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from PIL import Image

from gspn_t2i import GSPNAdapter, SelfAttentionMixer, tiny
from gspn_t2i.pipelines import load_pipeline


@pytest.fixture
def pipeline(pipeline_folder):
    loaded = DiffusionPipeline.from_pretrained(pipeline_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, **options):
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    return pipeline(prompt="a three", generator=torch.Generator().manual_seed(0), **options).images


def test_text_to_image(pipeline):
    before = draw(pipeline)
    adapter = GSPNAdapter.for_unet(pipeline.unet)
    adapter.mount(pipeline.unet)
    assert not np.allclose(draw(pipeline), before)
    assert draw(pipeline, height=64, width=128).shape == (1, 64, 128, 3)
    adapter.unmount()
    assert (draw(pipeline) == before).all()


@pytest.mark.parametrize("auto", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_other_pipelines_of_the_same_unet(pipeline, auto):
    GSPNAdapter.for_unet(pipeline.unet).mount(pipeline.unet)
    other = auto.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    assert any(isinstance(module, SelfAttentionMixer) for module in other.unet.modules())
    options = {"image": Image.new("RGB", (128, 64), "white"), "strength": 0.9, "num_inference_steps": 3}
    if auto is AutoPipelineForInpainting:
        options |= {"mask_image": Image.new("L", (128, 64), 255), "height": 64, "width": 128}
    assert draw(other, **options).shape == (1, 64, 128, 3)


def test_controlnet(pipeline):
    if pipeline.unet.config.addition_embed_type:
        pytest.skip("the control network of SDXL is made and used in the same way")
    plain = ControlNetModel.from_unet(pipeline.unet).state_dict()
    GSPNAdapter.for_unet(pipeline.unet).mount(pipeline.unet)
    control = ControlNetModel.from_unet(pipeline.unet)
    made = control.state_dict()
    assert plain.keys() == made.keys()
    assert all(torch.equal(plain[name], value) for name, value in made.items() if "blocks.0.attentions" in name)
    GSPNAdapter.for_unet(control).mount(control)
    controlled = StableDiffusionControlNetPipeline(**pipeline.components, controlnet=control)
    controlled.set_progress_bar_config(disable=True)
    assert draw(controlled, image=Image.new("RGB", (64, 128), "white")).shape == (1, 128, 64, 3)


def test_lora_on_the_rest_of_the_unet(pipeline):
    """A LoRA of cross-attention loads, acts, and unloads with the adapter mounted."""
    peft = pytest.importorskip("peft", reason="diffusers loads LoRA with peft")
    adapter = GSPNAdapter.for_unet(pipeline.unet)
    adapter.mount(pipeline.unet)
    before = draw(pipeline)
    config = peft.LoraConfig(r=2, target_modules=r".*attn2\.to_[qkv]", init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    assert not np.allclose(draw(pipeline), before)
    pipeline.unet.disable_adapters()
    # Up to rounding, as tensors lie at other addresses.
    assert np.allclose(draw(pipeline), before, atol=1e-4)
    pipeline.unet.delete_adapters("default")
    adapter.unmount()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_group_offload(pipeline):
    GSPNAdapter.for_unet(pipeline.unet).mount(pipeline.unet)
    before = draw(pipeline)
    cpu = torch.device("cpu")
    pipeline.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert (draw(pipeline) == before).all()


@pytest.mark.parametrize("mounted_first", [False, True])
def test_fused_projections(pipeline, mounted_first):
    before = draw(pipeline)
    adapter = GSPNAdapter.for_unet(pipeline.unet)
    steps = [lambda: adapter.mount(pipeline.unet), pipeline.fuse_qkv_projections]
    for step in steps if mounted_first else reversed(steps):
        step()
    assert np.isfinite(draw(pipeline)).all()
    steps = [adapter.unmount, pipeline.unfuse_qkv_projections]
    for step in steps if mounted_first else reversed(steps):
        step()
        if mounted_first:
            assert np.allclose(draw(pipeline), before, atol=1e-3)
    assert np.allclose(draw(pipeline), before, atol=1e-3)


def test_guidance_by_self_attention(pipeline):
    """PAG and SAG say which attention to keep, and work if it is kept."""
    sdxl = bool(pipeline.unet.config.addition_embed_type)
    perturbed = {
        "cls": StableDiffusionXLPAGPipeline if sdxl else StableDiffusionPAGPipeline,
        "call": {"pag_scale": 2.0},
    }
    cases = [perturbed] if sdxl else [perturbed, {"cls": StableDiffusionSAGPipeline, "call": {"sag_scale": 0.7}}]
    for case in cases:
        for keep in ([], ["mid_block"]):
            adapter = GSPNAdapter.for_unet(pipeline.unet, keep_attention=keep).mount(pipeline.unet)
            parts = {name: part for name, part in pipeline.components.items() if part is not None or "2" not in name}
            guided = case["cls"](**parts)
            guided.set_progress_bar_config(disable=True)
            if keep:
                assert np.isfinite(draw(guided, **case["call"])).all()
            else:
                with pytest.raises(
                    ValueError, match=r"mid_block.*attn1 must be a plain .* keep_attention=\['mid_block"
                ):
                    draw(guided, **case["call"])
            adapter.unmount()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_a_mounted_pipeline(pipeline, variant, tmp_path):
    before = draw(pipeline)
    GSPNAdapter.for_unet(pipeline.unet).mount(pipeline.unet)
    pipeline.save_pretrained(tmp_path, variant=variant)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant=variant)
    loaded.set_progress_bar_config(disable=True)
    assert not any(isinstance(module, SelfAttentionMixer) for module in loaded.unet.modules())
    assert (draw(loaded) == before).all()


def test_an_inpainting_pipeline_is_refused(sd15, tmp_path):
    """Nine channels: the text-to-image pipeline would fail in its first step."""
    pipeline = DiffusionPipeline.from_pretrained(sd15)
    pipeline.unet = tiny.make_unet("sd15", in_channels=9)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pipeline must draw from noise alone, in 4 channels, the UNet of .* takes 9"):
        load_pipeline(str(tmp_path), None, torch.float32)
