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
)
from PIL import Image

from gspn_t2i import GSPNAdapter, SelfAttentionMixer


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
    control = ControlNetModel.from_unet(pipeline.unet)
    GSPNAdapter.for_unet(pipeline.unet).mount(pipeline.unet)
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


def test_processors_are_those_of_what_is_left(pipeline):
    kept = len(pipeline.unet.attn_processors)
    adapter = GSPNAdapter.for_unet(pipeline.unet)
    adapter.mount(pipeline.unet)
    assert len(pipeline.unet.attn_processors) == kept - len(adapter.mixers)
    pipeline.unet.set_default_attn_processor()
    draw(pipeline)
