"""Upscaling: the loop against diffusers', DemoFusion's terms against their formulas, folders, and what is refused."""

import json
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image

from gspn_core.runs.options import ImageSize, make
from gspn_t2i import GSPNAdapter, SelfAttentionMixer, demofusion, pipelines, scaling, tiny, upscale
from gspn_t2i.config import GenerateConfig
from gspn_t2i.demofusion import Predictor, Terms
from gspn_t2i.generate import generate
from gspn_t2i.scaling import UpscaleConfig

CPU = torch.device("cpu")


def config(pipeline, out, **changes):
    values = {"prompt": "a three", "scale": 2, "sampler_steps": 3, "progress": False, **changes}
    if values.get("target"):
        values["scale"] = None
    return make(UpscaleConfig, {"pipeline": str(pipeline), "out": str(out), **values})


def images(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def noise_image(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def recorded(monkeypatch, vae):
    """Record the latents that an autoencoder is given to decode."""
    seen = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **options: seen.append(z.clone()) or decode(z, **options))
    return seen


@pytest.fixture
def pipeline(request):
    """An image-to-image pipeline with mixers; of SD 1.5, or of the family that the test names."""
    loaded = DiffusionPipeline.from_pretrained(request.getfixturevalue(getattr(request, "param", "sd15")))
    torch.manual_seed(0)
    GSPNAdapter.for_unet(loaded.unet).mount(loaded.unet)
    image_pipeline = AutoPipelineForImage2Image.from_pipe(loaded)
    image_pipeline.set_progress_bar_config(disable=True)
    return image_pipeline


both_families = pytest.mark.parametrize("pipeline", ["sd15", "sdxl"], indirect=True)


def run(pipeline, image, *, guidance=7.5, split=False, strength=0.6, steps=5, predict=None, **terms):
    predict = predict or Predictor(pipeline, CPU, (image.height, image.width), "a three", None, guidance, split)
    options = {"strength": strength, "steps": steps, "generator": torch.Generator().manual_seed(1), "device": CPU}
    with torch.inference_mode():
        return demofusion.image_to_image(pipeline, image, predict, terms=Terms(**terms), **options)


SCHEDULERS = [(None, {}), (None, {"prediction_type": "v_prediction"}), ("PNDMScheduler", {"skip_prk_steps": True})]
SCHEDULERS += [
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("HeunDiscreteScheduler", {}),
]


def with_scheduler(pipeline, name, options):
    kind = getattr(diffusers, name) if name else type(pipeline.scheduler)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)


@pytest.mark.parametrize(
    "pipeline,guidance,name,options",
    [*(("sd15", 7.5, *scheduler) for scheduler in SCHEDULERS), ("sdxl", 7.5, None, {}), ("sdxl", 1.0, None, {})],
    indirect=["pipeline"],
)
def test_the_loop_is_that_of_diffusers(pipeline, name, options, guidance, monkeypatch):
    with_scheduler(pipeline, name, options)
    seen = recorded(monkeypatch, pipeline.vae)
    image = noise_image(64, 96)
    asked = {"strength": 0.6, "num_inference_steps": 5, "guidance_scale": guidance}
    theirs = pipeline("a three", image=image, generator=torch.Generator().manual_seed(1), **asked).images[0]
    ours = run(pipeline, image, guidance=guidance)
    assert torch.equal(seen[0], seen[1])
    assert (np.asarray(ours) == np.asarray(theirs)).all()
    run(pipeline, image, guidance=guidance, split=True)
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-4, atol=1e-4 * float(seen[0].abs().max()))


def test_a_distilled_unet_is_told_the_guidance(pipeline, monkeypatch):
    family = "sdxl" if pipeline.unet.config.addition_embed_type else "sd15"
    torch.manual_seed(0)
    pipeline.unet = tiny.make_unet(family, time_cond_proj_dim=8)
    torch.nn.init.normal_(pipeline.unet.time_embedding.cond_proj.weight)
    seen = recorded(monkeypatch, pipeline.vae)
    image = noise_image(64, 64)
    options = {"strength": 0.6, "num_inference_steps": 5, "generator": torch.Generator().manual_seed(1)}
    pipeline("a three", image=image, guidance_scale=4.0, **options)
    run(pipeline, image, guidance=4.0)
    assert torch.equal(seen[0], seen[1])
    run(pipeline, image, guidance=8.0)
    assert not torch.equal(seen[1], seen[2])


def test_cosine_factor():
    for t, expected in ((1000, 1.0), (750, 0.5 + 0.5 * math.sqrt(0.5)), (500, 0.5), (0, 0.0)):
        assert demofusion.cosine_factor(t, 1000) == pytest.approx(expected)


def plain_blur(latents, sigma):
    """A Gaussian beyond the edges' values, place by place; then each channel's mean and deviation as before."""
    radius = max(1, math.ceil(3 * sigma))
    places = torch.arange(-radius, radius + 1).double()
    weight = torch.exp(-(places[:, None] ** 2 + places**2) / (2 * sigma**2))
    channels = F.pad(latents.double().transpose(0, 1), (radius,) * 4, mode="replicate")
    out = F.conv2d(channels, (weight / weight.sum())[None, None])[:, 0]
    for blurred, before in zip(out, latents[0].double(), strict=True):
        blurred.copy_((blurred - blurred.mean()) / blurred.std() * before.std() + before.mean())
    return out[None]


@pytest.mark.parametrize("sigma", [0.01, 0.4, 1.0, 2.5])
def test_blur(sigma):
    latents = torch.randn(1, 4, 9, 14, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        demofusion.blur(latents, sigma).double(), plain_blur(latents, sigma), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(demofusion.blur(torch.full((1, 2, 5, 5), 3.0), sigma), torch.full((1, 2, 5, 5), 3.0))


@pytest.mark.parametrize("height,width,dilation", [(8, 12, 2), (9, 14, 4), (7, 3, 3), (5, 5, 1)])
def test_interlaced_latents_return_to_their_places(height, width, dilation):
    latents = torch.randn(1, 4, height, width)
    seen = []
    out = demofusion.interlaced(lambda part: seen.append(part) or 2 * part, latents, dilation, 3)
    assert torch.equal(out, 2 * latents)
    assert sum(len(part) for part in seen) == dilation**2
    assert max(len(part) for part in seen) <= 3
    assert torch.equal(seen[0][0], latents[0, :, ::dilation, ::dilation])


def test_the_terms_are_their_formulas(monkeypatch):
    """With a made-up prediction and DDIM written out."""
    pipeline = AutoPipelineForImage2Image.from_pipe(tiny.build("sd15"))
    pipeline.scheduler.register_to_config(timestep_spacing="leading")
    seen = recorded(monkeypatch, pipeline.vae)

    class Predict:
        dtype = torch.float32

        def __call__(self, scheduler, latents, t):
            return torch.sin(latents) + 0.1 * latents.roll(1, dims=-1)

    image, sigma = noise_image(72, 96), 0.7
    terms = {"skip_residual": True, "dilation": 2, "cosine_scale_1": 2, "cosine_scale_2": 1.5, "sigma": sigma}
    run(pipeline, image, predict=Predict(), strength=0.8, batch=3, **terms)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        clean = demofusion.encode(pipeline, image, CPU, torch.float32, generator).double()
    noise = torch.randn(clean.shape, generator=generator).double()
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)

    def noised(t):
        return alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * noise

    def ddim(z, prediction, t):
        after = alphas[t - 200] if t >= 200 else alphas[0]
        start = (z - (1 - alphas[t]).sqrt() * prediction) / alphas[t].sqrt()
        return after.sqrt() * start + (1 - after).sqrt() * prediction

    z = noised(601)
    for t in (601, 401, 201, 1):
        cf = 0.5 * (1 + math.cos(math.pi * (1000 - t) / 1000))
        c1, c2, c3 = cf**2, cf**1.5, sigma * (0.99 * cf + 0.01)
        z = c1 * noised(t) + (1 - c1) * z
        blurred = plain_blur(z, c3)
        prediction = torch.zeros_like(z)
        for i in range(2):
            for j in range(2):
                prediction[..., i::2, j::2] = Predict()(None, blurred[..., i::2, j::2], t)
        z = c2 * ddim(blurred, prediction, t) + (1 - c2) * ddim(z, Predict()(None, z, t), t)
    torch.testing.assert_close(seen[0].double() * 0.18215, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name,options", SCHEDULERS[:-1])
def test_the_terms_with_every_scheduler(pipeline, name, options, monkeypatch):
    with_scheduler(pipeline, name, options)
    seen = recorded(monkeypatch, pipeline.vae)
    image, terms = noise_image(96, 64), {"skip_residual": True, "dilation": 2, "strength": 0.4}
    run(pipeline, image, strength=0.4)
    run(pipeline, image, cosine_scale_1=1e9, cosine_scale_2=1e9, **terms)
    assert torch.equal(seen[0], seen[1])  # c1 = c2 = 0
    run(pipeline, image, **terms)
    assert torch.isfinite(seen[2]).all() and not torch.allclose(seen[2], seen[1], rtol=1e-2)


@both_families
def test_a_safety_checker_and_a_watermark_act(pipeline):
    image = noise_image(64, 64)
    if hasattr(pipeline, "run_safety_checker"):
        pipeline.safety_checker = lambda images, clip_input: (torch.zeros_like(images), [True])
        features = SimpleNamespace(pixel_values=torch.zeros(1), to=lambda device: features)
        pipeline.feature_extractor = lambda pils, return_tensors: features
    else:
        pipeline.watermark = SimpleNamespace(apply_watermark=lambda pixels: -torch.ones_like(pixels))
    assert not np.asarray(run(pipeline, image)).any()


@pytest.mark.parametrize(
    "pipeline_folder,terms", [("sd15", {}), ("sdxl", {"demofusion": True})], indirect=["pipeline_folder"]
)
def test_a_folder(pipeline_folder, adapter_folder, terms, tmp_path):
    drawing = config(pipeline_folder, tmp_path / "out", adapter=adapter_folder, image_size="64x80", scale=4, **terms)
    result = upscale.upscale(drawing)
    assert (result["size"], result["drawn"]) == ("256x320", 3)
    assert [step["dilation"] for step in result["steps"]] == ([2, 4] if terms else [1, 1])
    assert result["peak_bytes"] > 0 and json.dumps(result)
    assert f"{tmp_path}/out/step-256x320.png: 3 images in " in scaling.as_text(result)
    files = images(tmp_path / "out")
    assert list(files) == ["base.png", "step-128x160.png", "step-256x320.png"]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["prompt"] == "a three"
    # The first is that of generate; the second, without terms, what diffusers makes of it.
    options = {"pipeline": drawing.pipeline, "adapter": adapter_folder, "prompts": ["a three"], "sampler_steps": 3}
    options |= {"image_size": ImageSize(64, 80), "progress": False, "out": str(tmp_path / "drawn")}
    generate(GenerateConfig(**options))
    assert images(tmp_path / "drawn" / "images")["000000.png"] == files["base.png"]
    pipeline = AutoPipelineForImage2Image.from_pipe(
        pipelines.load_pipeline(drawing.pipeline, adapter_folder, torch.float32)
    )
    pipeline.set_progress_bar_config(disable=True)
    assert any(isinstance(module, SelfAttentionMixer) for module in pipeline.unet.modules())
    with Image.open(tmp_path / "out" / "base.png") as base:
        larger = base.resize((160, 128), Image.Resampling.LANCZOS)
    options = {"strength": 0.42, "num_inference_steps": 3, "guidance_scale": 7.5}
    theirs = pipeline("a three", image=larger, generator=torch.Generator().manual_seed(1), **options).images[0]
    with Image.open(tmp_path / "out" / "step-128x160.png") as ours:
        assert (np.asarray(ours) == np.asarray(theirs)).all() == (not terms)
    # Continued after any of the files, and not continued when finished or for something else.
    for left in (["base.png"], ["base.png", "step-128x160.png"], list(files)):
        for name in files:
            if name not in left:
                (tmp_path / "out" / name).unlink()
        again = upscale.upscale(UpscaleConfig(**{**vars(drawing), "vae_tiling": "never"}))
        assert again["drawn"] == 3 - len(left)
        assert images(tmp_path / "out") == files
    with pytest.raises(ValueError, match="results of other settings: seed was 0, is 1; give another folder"):
        upscale.upscale(UpscaleConfig(**{**vars(drawing), "seed": 1}))
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds step-256x320.png of unknown settings"):
        upscale.upscale(drawing)


def test_a_folder_grows_to_larger_images(sd15, tmp_path):
    """By further steps; not back to fewer, and not to other steps."""
    upscale.upscale(config(sd15, tmp_path / "out"))
    files = images(tmp_path / "out")
    assert upscale.upscale(config(sd15, tmp_path / "out", scale=4))["drawn"] == 1
    assert files.items() < images(tmp_path / "out").items()
    for changes in ({}, {"target": "192x192"}, {"scale": 4, "strengths": [0.9, 0.9]}):
        with pytest.raises(ValueError, match=r"scale or target must begin with what the 2 results in .* were made of"):
            upscale.upscale(config(sd15, tmp_path / "out", **changes))


def test_an_image_file(sd15, tmp_path, capsys):
    noise_image(40, 60).save(tmp_path / "photo.jpg")
    options = {"image": str(tmp_path / "photo.jpg"), "target": "96x144", "strengths": [0.5, 1.0]}
    result = upscale.upscale(config(sd15, tmp_path / "out", **options, progress=True))
    assert list(images(tmp_path / "out")) == ["base.png", "step-80x120.png", "step-96x144.png"]
    with Image.open(result["image"]) as image, Image.open(tmp_path / "photo.jpg") as original:
        assert image.size == (144, 96)
        with Image.open(tmp_path / "out" / "base.png") as base:
            assert (np.asarray(base) == np.asarray(original)).all()
    assert f"{tmp_path}/out/step-80x120.png: " in capsys.readouterr().err
    text = scaling.as_text(result)
    assert "80x120: strength 0.5, 1 of 3 sampler steps, " in text and "GiB of memory" in text
    noise_image(40, 64).save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="results of other settings: image was"):
        upscale.upscale(config(sd15, tmp_path / "out", **{**options, "target": "80x128", "strengths": [1.0]}))


SQUARE = [(2048, 2048), (3000, 3000)]
WIDE = [(1152, 2048), (2304, 4096)]
ODD = [(664, 1000), (1336, 2000)]


@pytest.mark.parametrize("image,expected", [((1024, 1024), SQUARE), ((576, 1024), WIDE), ((333, 500), ODD)])
def test_sizes(image, expected):
    assert scaling.sizes(ImageSize(*image), ImageSize(*expected[-1])) == [ImageSize(*size) for size in expected]
    # Twice is the target, but for rounding.
    assert scaling.sizes(ImageSize(63, 63), ImageSize(128, 128)) == [ImageSize(128, 128)]


def test_strengths_and_steps_by_size():
    steps = scaling.plan(config("p", "out", scale=16, sampler_steps=50), ImageSize(512, 512), 512)
    assert [step.strength for step in steps] == [0.42, 0.32, 0.32, 0.28]
    assert [step.sampler_steps for step in steps] == [50, 50, 30, 30]
    options = {"scale": 16, "sampler_steps": 50, "strength_schedule": "2k-16k", "dilated": True}
    steps = scaling.plan(config("p", "out", **options), ImageSize(576, 1024), 768)
    assert [step.strength for step in steps] == [0.4, 0.3, 0.2, 0.1]
    assert [step.dilation for step in steps] == [2, 4, 8, 16]


def test_savers_by_size():
    def at(height, width, **changes):
        saving = upscale.savers(config("p", "out", **changes), ImageSize(height, width))
        return (saving.vae_tiling, saving.split_guidance, saving.chunked_feed_forward)

    assert at(1024, 1024) == (False, False, False)
    assert at(1024, 1032) == at(2048, 2048) == (True, False, False)
    assert at(4096, 2304) == at(3840, 2160) == at(16384, 16384) == (True, True, True)
    assert at(4096, 4096, memory="never") == (False, False, False)
    assert at(4096, 4096, memory="never", split_guidance="always") == (False, True, False)
    assert at(4096, 4096, vae_tiling="never", chunked_feed_forward="never") == (False, True, False)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("pipeline_folder", ["sdxl"], indirect=True)
def test_savers_change_little(pipeline_folder, adapter_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "use_cpu", lambda device: False)  # so that offloading can be tried everywhere
    monkeypatch.setattr(demofusion, "CHUNK", 32)
    sizes = []
    kind = diffusers.models.attention.FeedForward
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *args: sizes.append(x.shape[1]) or forward(self, x, *args))
    cases = {"plain": {}, "chunks": {"chunked_feed_forward": "always"}, "split": {"split_guidance": "always"}}
    cases |= {"model": {"offload": "model"}, "group": {"offload": "group"}, "tiles": {"vae_tiling": "always"}}
    cases |= {"casting": {"offload": "group", "layerwise_casting": True}}
    results, counts = {}, {}
    for name, options in cases.items():
        sizes.clear()
        options = {"adapter": adapter_folder, "target": "88x88", "precision": "fp32"} | options
        saving = config(pipeline_folder, tmp_path / name, **options)
        with Image.open(upscale.upscale(saving)["image"]) as image:
            results[name] = np.asarray(image, dtype=int)
        counts[name] = max(sizes)
    assert counts["plain"] > 32 >= counts["chunks"]
    for name in ("chunks", "split", "model", "group"):
        assert np.abs(results[name] - results["plain"]).max() <= 1, name
    for name in ("casting", "tiles"):
        assert 0 < np.abs(results[name] - results["plain"]).mean() < 40, name


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompt": " "}, "prompt must not be empty, got ' '"),
        ({"scale": None}, "either scale or target must be set, got None and None"),
        ({"scale": 3}, "scale: .*2, 4, 8, 16"),
        ({"target": "100x128"}, "target must be multiples of 8, got 100x128"),
        ({"target": "64"}, "target must be larger than the image's 64x64, got 64x64"),
        ({"target": "128x256"}, "target must have the shape of the image's 64x64, got 128x256"),
        ({"image_size": "60x64"}, "image_size must be multiples of 8, got 60x64"),
        ({"image_size": 64, "image": "photo.png"}, "image_size is for an image that is drawn first, got 64x64 and"),
        ({"image": "nothing.png"}, "no image 'nothing.png'"),
        ({"image": __file__}, "cannot read image '.*test_upscale.py': not an image"),
        ({"strengths": [0.0]}, r"strengths must be above 0 and at most 1, got \[0.0\]"),
        ({"strengths": [0.5, 0.5]}, r"strengths must be 1, for 128x128; got 2: \[0.5, 0.5\]"),
        ({"strengths": [0.1]}, "strengths must leave a step to run, 0.1 of 3 sampler steps leaves none"),
        ({"strength_schedule": "3k"}, "strength_schedule must be one of 1k-8k, 2k-16k, got 3k"),
        ({"sigma": 0.0}, "sigma must be a number above 0, got 0.0"),
        ({"cosine_scale_2": -1.0}, "cosine_scale_2 must be a number from 0, got -1.0"),
        ({"offload": "group"}, "offload needs an accelerator to be useful, got 'group' on the CPU"),
        ({"pipeline": "no/such/pipeline"}, "no pipeline 'no/such/pipeline'"),
        ({"adapter": "no/such/adapter"}, "no adapter 'no/such/adapter'"),
    ],
)
def test_wrong_options(sd15, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        upscale.upscale(config(changes.pop("pipeline", sd15), tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_an_odd_image_and_a_scheduler_of_two_predictions(sd15, tmp_path):
    noise_image(33, 50).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="scale must give multiples of 8, 2 times 33x50 is 66x100; give a target"):
        upscale.upscale(config(sd15, tmp_path / "out", image=str(tmp_path / "photo.png")))
    pipeline = DiffusionPipeline.from_pretrained(sd15)
    pipeline.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "heun")
    with pytest.raises(ValueError, match="a scheduler with one prediction in a step, not HeunDiscreteScheduler"):
        upscale.upscale(config(tmp_path / "heun", tmp_path / "out", skip_residual=True))


def test_out_of_memory_says_what_helps(sd15, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(upscale, "image_to_image", fail)
    savers = "--precision bf16, --vae-tiling always, --split-guidance always, --chunked-feed-forward always"
    with pytest.raises(MemoryError, match=rf"what saves some: {savers}, --dilated-batch 1 \(tried"):
        upscale.upscale(config(sd15, tmp_path / "out", dilated=True))
    assert list(images(tmp_path / "out")) == ["base.png"]


def test_several_processes_are_refused(sd15, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="upscale runs in one process, got WORLD_SIZE 2"):
        upscale.upscale(config(sd15, tmp_path / "out"))
