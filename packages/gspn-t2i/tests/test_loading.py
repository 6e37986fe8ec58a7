"""What the commands load beside a pipeline's folder: variants, single files, LoRAs, a ControlNet, and schedulers."""

import re

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image
from safetensors.torch import save_file
from t2i_cases import distill_config

from gspn_core.runs.options import ImageSize
from gspn_t2i import GSPNAdapter, SelfAttentionMixer, pipelines
from gspn_t2i.config import GenerateConfig
from gspn_t2i.distill import Distiller
from gspn_t2i.generate import Generation, generate

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE = [(r"mid_block.attentions.0", "mid.attn_1"), (r"mid_block.resnets.0", "mid.block_1")]
VAE += [(r"mid_block.resnets.1", "mid.block_2"), (r"down_blocks.(\d).resnets", r"down.\1.block")]
VAE += [(r"down_blocks.(\d).downsamplers.0", r"down.\1.downsample"), ("conv_norm_out", "norm_out")]
VAE += [("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), (r"to_([qkv])\.", r"\1."), (r"to_out.0", "proj_out")]


def config(pipeline, out, **changes):
    values = {"prompts": ["a three"], "sampler_steps": 2, "progress": False, **changes}
    return GenerateConfig(pipeline=str(pipeline), out=str(out), **values)


def drawn(pipeline, out, **changes):
    generate(config(pipeline, out, **changes))
    with Image.open(out / "images" / "000000.png") as image:
        return np.asarray(image, int)


def unet_name(key):
    """The name of a weight of a UNet with one layer in a block in Stable Diffusion's own files."""
    kind, level, part, layer, rest = (*key.split(".", 4), *[""] * 4)[:5]
    inner = re.sub(r"^\w+", lambda name: RESNET.get(name[0], name[0]), rest) if part == "resnets" else rest
    if kind == "down_blocks" and part == "downsamplers":
        return f"input_blocks.{2 + 2 * int(level)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "down_blocks":
        return f"input_blocks.{1 + 2 * int(level)}.{int(part == 'attentions')}.{inner}"
    if kind == "up_blocks" and part == "upsamplers":
        return f"output_blocks.{1 + 2 * int(level)}.{1 if level == '0' else 2}.{rest}"
    if kind == "up_blocks":
        return f"output_blocks.{2 * int(level) + int(layer)}.{int(part == 'attentions')}.{inner}"
    if kind == "mid_block":
        place, rest = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[level + part], key.split(".", 3)[3]
        return f"middle_block.{place}." + (re.sub(r"^\w+", lambda n: RESNET[n[0]], rest) if place != 1 else rest)
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    stem, _, last = key.rpartition(".")
    return f"{names[stem]}.{last}"


def vae_name(key):
    """The same of an autoencoder of four levels."""
    for pattern, name in VAE:
        key = re.sub(pattern, name, key)
    key = re.sub(r"up_blocks.(\d).resnets", lambda found: f"up.{3 - int(found[1])}.block", key)
    return re.sub(r"up_blocks.(\d).upsamplers.0", lambda found: f"up.{3 - int(found[1])}.upsample", key)


@pytest.fixture(scope="module")
def single_file(sd15, tmp_path_factory):
    """The tiny pipeline as one file, as Stable Diffusion's authors wrote them."""
    pipeline = DiffusionPipeline.from_pretrained(sd15)
    weights = {f"model.diffusion_model.{unet_name(key)}": value for key, value in pipeline.unet.state_dict().items()}
    for key, value in pipeline.vae.state_dict().items():
        attention = "mid_block.attentions.0.to_" in key and key.endswith("weight")
        weights[f"first_stage_model.{vae_name(key)}"] = value[..., None, None] if attention else value
    for key, value in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, file)
    return file


def test_a_single_file(sd15, single_file, digits, tmp_path):
    """Draws what the folder draws, and is a teacher."""
    options = {"pipeline_config": str(sd15), "image_size": ImageSize(64, 64)}
    assert (drawn(single_file, tmp_path / "file", **options) == drawn(sd15, tmp_path / "folder")).all()
    run = Distiller(distill_config(single_file, digits, tmp_path / "run", pipeline_config=str(sd15)))
    assert sum(p.numel() for p in run.adapter.parameters()) > 0
    save_file({"mixers.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"pipeline must be of Stable Diffusion .*, '.*other.safetensors' is no"):
        generate(config(tmp_path / "other.safetensors", tmp_path / "out"))


def test_a_variant(sd15, tmp_path):
    loaded = DiffusionPipeline.from_pretrained(sd15)
    loaded.save_pretrained(tmp_path / "pipeline", variant="fp16")
    assert (drawn(tmp_path / "pipeline", tmp_path / "out", variant="fp16") == drawn(sd15, tmp_path / "own")).all()
    with pytest.raises(ValueError, match="variant=bf16"):
        generate(config(tmp_path / "pipeline", tmp_path / "other", variant="bf16"))


def test_loras_and_an_adapter(sd15, tmp_path):
    peft = pytest.importorskip("peft", reason="diffusers loads LoRA with peft")
    loaded = DiffusionPipeline.from_pretrained(sd15)
    GSPNAdapter.for_unet(loaded.unet).save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    weights = peft.LoraConfig(r=2, target_modules=r".*attn[12]\.to_[qkv]", init_lora_weights=False)
    loaded.unet.add_adapter(weights)
    state = peft.get_peft_model_state_dict(loaded.unet)
    loaded.save_lora_weights(tmp_path / "lora", unet_lora_layers=state)
    file = str(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    for number, adapter in enumerate((None, str(tmp_path / "adapter"))):
        without = drawn(sd15, tmp_path / f"without-{number}", adapter=adapter)
        options = {"adapter": adapter, "lora": [str(tmp_path / "lora")]}
        assert (drawn(sd15, tmp_path / f"with-{number}", **options) != without).any()
        both = {"adapter": adapter, "lora": [file, file], "lora_scales": [0.5, -0.5]}
        assert np.abs(drawn(sd15, tmp_path / f"both-{number}", **both) - without).max() <= 1
    mounted = Generation(config(sd15, tmp_path / "x", **options)).pipeline.unet
    assert any(isinstance(module, SelfAttentionMixer) for module in mounted.modules())
    with pytest.raises(FileNotFoundError, match=r"no LoRA 'no/such/lora\.safetensors'"):
        generate(config(sd15, tmp_path / "out", lora=["no/such/lora.safetensors"]))
    save_file({"unet.none.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lora '.*other.safetensors' does not fit the pipeline: "):
        generate(config(sd15, tmp_path / "out", lora=[str(tmp_path / "other.safetensors")]))


def test_a_controlnet(sd15, tmp_path):
    """As diffusers draws with it; another image for it is another folder."""
    loaded = DiffusionPipeline.from_pretrained(sd15)
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(loaded.unet)
    for part in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.1)  # untrained, they add nothing
    control.save_pretrained(tmp_path / "controlnet")
    edges = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    edges.save(tmp_path / "edges.png")
    options = {"controlnet": str(tmp_path / "controlnet"), "control_image": str(tmp_path / "edges.png")}
    ours = drawn(sd15, tmp_path / "out", **options, control_scale=0.5, images_per_prompt=2, batch_size=2)
    controlled = StableDiffusionControlNetPipeline(**loaded.components, controlnet=control)
    controlled.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    theirs = controlled("a three", edges, num_inference_steps=2, generator=generator, controlnet_conditioning_scale=0.5)
    assert np.abs(ours - np.asarray(theirs.images[0])).max() <= 1
    assert np.abs(ours - drawn(sd15, tmp_path / "plain")).max() > 1
    edges.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "edges.png")
    with pytest.raises(ValueError, match="results of other settings: control_sha256 was"):
        generate(config(sd15, tmp_path / "out", **options, control_scale=0.5, images_per_prompt=2))
    with pytest.raises(FileNotFoundError, match="or ControlNet 'no/such/one'"):
        generate(config(sd15, tmp_path / "x", **options | {"controlnet": "no/such/one"}))


def test_a_scheduler(sd15, tmp_path):
    own = DiffusionPipeline.from_pretrained(sd15)
    chosen = config(sd15, tmp_path / "out", scheduler="DDIMScheduler", scheduler_kwargs={"set_alpha_to_one": True})
    scheduler = pipelines.open_pipeline(chosen, chosen.pipeline).scheduler
    assert type(scheduler) is DDIMScheduler and scheduler.config.set_alpha_to_one
    assert scheduler.config.beta_end == own.scheduler.config.beta_end
    ours = drawn(sd15, tmp_path / "out", scheduler="DDIMScheduler")
    own.scheduler = DDIMScheduler.from_config(own.scheduler.config)
    own.set_progress_bar_config(disable=True)
    theirs = own("a three", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert (ours == np.asarray(theirs)).all()
    for changes, message in [
        ({"scheduler": "DDIM"}, "scheduler must be one of .*DDIMScheduler.*, got 'DDIM'"),
        ({"scheduler_kwargs": {"sigmas": 1}}, "scheduler_kwargs must be arguments of .*Scheduler, got 'sigmas'"),
        ({"scheduler": "EulerDiscreteScheduler"}, "results of other settings: scheduler was 'DDIMScheduler'"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(config(sd15, tmp_path / "out", **changes))
