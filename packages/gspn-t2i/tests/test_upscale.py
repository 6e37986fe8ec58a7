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

from gspn_t2i import GSPNAdapter, SelfAttentionMixer, demofusion, generate, scaling, tiny, upscale
from gspn_t2i.demofusion import Predictor, Terms
from gspn_t2i.upscale import UpscaleConfig

CPU = torch.device("cpu")


def config(pipeline, out, **changes):
    values = {"prompt": "a three", "scale": 2, "steps": 3, "progress": False, **changes}
    if values.get("target"):
        values["scale"] = None
    return UpscaleConfig(pipeline=str(pipeline), out=str(out), **values)


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
def pipeline(pipeline_folder):
    """An image-to-image pipeline with mixers."""
    loaded = DiffusionPipeline.from_pretrained(pipeline_folder)
    torch.manual_seed(0)
    GSPNAdapter.for_unet(loaded.unet).mount(loaded.unet)
    made = AutoPipelineForImage2Image.from_pipe(loaded)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def adapter_folder(pipeline_folder, tmp_path_factory):
    unet = DiffusionPipeline.from_pretrained(pipeline_folder).unet
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    GSPNAdapter.for_unet(unet).save_pretrained(folder)
    return str(folder)


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


@pytest.mark.parametrize("guidance,name,options", [*((7.5, *given) for given in SCHEDULERS), (1.0, None, {})])
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
    for made, was in zip(out, latents[0].double(), strict=True):
        made.copy_((made - made.mean()) / made.std() * was.std() + was.mean())
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


def test_a_safety_checker_and_a_watermark_act(pipeline):
    image = noise_image(64, 64)
    if hasattr(pipeline, "run_safety_checker"):
        pipeline.safety_checker = lambda images, clip_input: (torch.zeros_like(images), [True])
        features = SimpleNamespace(pixel_values=torch.zeros(1), to=lambda device: features)
        pipeline.feature_extractor = lambda pils, return_tensors: features
    else:
        pipeline.watermark = SimpleNamespace(apply_watermark=lambda pixels: -torch.ones_like(pixels))
    assert not np.asarray(run(pipeline, image)).any()


@pytest.mark.parametrize("terms", [{}, {"demofusion": True}])
def test_a_folder(pipeline_folder, adapter_folder, terms, tmp_path):
    made = config(pipeline_folder, tmp_path / "out", adapter=adapter_folder, height=64, width=80, scale=4, **terms)
    summary = upscale.upscale(made)
    assert (summary["height"], summary["width"], summary["drawn"]) == (256, 320, 3)
    assert [step["dilation"] for step in summary["steps"]] == ([2, 4] if terms else [1, 1])
    assert summary["peak_bytes"] > 0
    files = images(tmp_path / "out")
    assert list(files) == ["base.png", "step-128x160.png", "step-256x320.png"]
    assert json.loads((tmp_path / "out" / "upscale.json").read_text())["prompt"] == "a three"
    # The first is that of generate; the second, without terms, what diffusers makes of it.
    options = {"pipeline": made.pipeline, "adapter": adapter_folder, "prompt": "a three", "height": 64, "width": 80}
    generate.generate(generate.GenerateConfig(**options, steps=3, progress=False, out=str(tmp_path / "drawn")))
    assert images(tmp_path / "drawn")["000000.png"] == files["base.png"]
    loaded = generate.load_pipeline(made.pipeline, adapter_folder, torch.float32)
    pipeline = AutoPipelineForImage2Image.from_pipe(loaded)
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
        again = upscale.upscale(UpscaleConfig(**{**vars(made), "vae_tiling": "off"}))
        assert again["drawn"] == 3 - len(left)
        assert images(tmp_path / "out") == files
    with pytest.raises(ValueError, match="holds another image: seed was 0, is 1; give another folder"):
        upscale.upscale(UpscaleConfig(**{**vars(made), "seed": 1}))
    (tmp_path / "out" / "upscale.json").unlink()
    with pytest.raises(ValueError, match=r"holds step-256x320.png of unknown settings"):
        upscale.upscale(made)


def test_a_given_image(pipeline_folder, tmp_path, capsys):
    noise_image(40, 60).save(tmp_path / "given.jpg")
    options = {"image": str(tmp_path / "given.jpg"), "target": (96, 144), "strengths": [0.5, 1.0]}
    summary = upscale.upscale(config(pipeline_folder, tmp_path / "out", **options, progress=True))
    assert list(images(tmp_path / "out")) == ["base.png", "step-80x120.png", "step-96x144.png"]
    with Image.open(summary["image"]) as image, Image.open(tmp_path / "given.jpg") as given:
        assert image.size == (144, 96)
        with Image.open(tmp_path / "out" / "base.png") as base:
            assert (np.asarray(base) == np.asarray(given)).all()
    said = capsys.readouterr().err
    assert "80x120: strength 0.5, 1 of 3 steps" in said and "GiB of memory" in said
    noise_image(40, 64).save(tmp_path / "given.jpg")
    with pytest.raises(ValueError, match="holds another image: image was"):
        upscale.upscale(
            config(pipeline_folder, tmp_path / "out", **{**options, "target": (80, 128), "strengths": [1.0]})
        )


SQUARE = [(2048, 2048), (3000, 3000)]
WIDE = [(1152, 2048), (2304, 4096)]
ODD = [(664, 1000), (1336, 2000)]


@pytest.mark.parametrize("image,expected", [((1024, 1024), SQUARE), ((576, 1024), WIDE), ((333, 500), ODD)])
def test_sizes(image, expected):
    assert scaling.sizes(image, expected[-1]) == expected
    assert scaling.sizes((63, 63), (128, 128)) == [(128, 128)]  # twice is the target, but for rounding


def test_strengths_and_steps_by_size():
    made = scaling.plan(config("p", "out", scale=16, steps=50), (512, 512), 512)
    assert [step.strength for step in made] == [0.42, 0.32, 0.32, 0.28]
    assert [step.steps for step in made] == [50, 50, 30, 30]
    made = scaling.plan(config("p", "out", scale=16, steps=50, strengths="2k-16k", dilated=True), (576, 1024), 768)
    assert [step.strength for step in made] == [0.4, 0.3, 0.2, 0.1]
    assert [step.dilation for step in made] == [2, 4, 8, 16]


def test_savers_by_size():
    def chosen(height, width, **changes):
        made = scaling.savers(UpscaleConfig(pipeline="p", prompt="a", **changes), height, width)
        return (made.vae_tiling, made.split_guidance, made.chunked_feed_forward)

    assert chosen(1024, 1024) == (False, False, False)
    assert chosen(1024, 1032) == chosen(2048, 2048) == (True, False, False)
    assert chosen(4096, 2304) == chosen(3840, 2160) == chosen(16384, 16384) == (True, True, True)
    assert chosen(4096, 4096, memory="none") == (False, False, False)
    assert chosen(4096, 4096, memory="none", split_guidance="on") == (False, True, False)
    assert chosen(4096, 4096, vae_tiling="off", chunked_feed_forward="off") == (False, True, False)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_savers_change_little(pipeline_folder, adapter_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(upscale, "use_cpu", lambda device: False)  # so that offloading may be tried everywhere
    monkeypatch.setattr(demofusion, "CHUNK", 32)
    sizes = []
    kind = diffusers.models.attention.FeedForward
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, *args: sizes.append(x.shape[1]) or forward(self, x, *args))
    cases = {"plain": {}, "chunks": {"chunked_feed_forward": "on"}, "split": {"split_guidance": "on"}}
    cases |= {"model": {"offload": "model"}, "group": {"offload": "group"}, "tiles": {"vae_tiling": "on"}}
    cases |= {"casting": {"offload": "group", "layerwise_casting": True}}
    results, counts = {}, {}
    for name, options in cases.items():
        sizes.clear()
        made = config(pipeline_folder, tmp_path / name, adapter=adapter_folder, target=(88, 88), **options)
        with Image.open(upscale.upscale(made)["image"]) as image:
            results[name] = np.asarray(image, dtype=int)
        counts[name] = max(sizes)
    assert counts["plain"] > 32 >= counts["chunks"]
    for name in ("chunks", "split", "model", "group"):
        assert np.abs(results[name] - results["plain"]).max() <= 1, name
    for name in ("casting", "tiles"):
        assert 0 < np.abs(results[name] - results["plain"]).mean() < 40, name


@pytest.mark.parametrize("pipeline_folder", ["sd15"], indirect=True)
@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompt": " "}, "prompt must not be empty, got ' '"),
        ({"scale": None}, "one of scale and target must be given, got None and None"),
        ({"scale": 3}, "scale must be 2, 4, 8 or 16, got 3"),
        ({"target": (100, 128)}, "target must be multiples of 8, got 100x128"),
        ({"target": (64, 64)}, "target must be larger than the image's 64x64, got 64x64"),
        ({"target": (128, 256)}, "target must have the shape of the image's 64x64, got 128x256"),
        ({"target": (128,)}, r"target must be a height and a width, got \(128,\)"),
        ({"height": 60}, "height must be a multiple of 8, got 60"),
        ({"width": 64, "image": "given.png"}, "width is of an image that is drawn first; image is given, got 64"),
        ({"image": "nothing.png"}, "no image 'nothing.png'"),
        ({"image": __file__}, "image must be an image file, '.*test_upscale.py' cannot be read"),
        ({"strengths": [0.0]}, r"strengths must be above 0 and at most 1, got \[0.0\]"),
        ({"strengths": [0.5, 0.5]}, r"strengths must be 1, for 128x128; got 2: \[0.5, 0.5\]"),
        ({"strengths": [0.1]}, "strengths must leave a step to run, 0.1 of 3 steps leaves none"),
        ({"strengths": "3k"}, "strengths must be of 1k-8k, 2k-16k or a list, got '3k'"),
        ({"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ({"cosine_scale_2": -1.0}, "cosine_scale_2 must be at least 0, got -1.0"),
        ({"offload": "group"}, "offload needs an accelerator to be useful, got 'group' on the CPU"),
        ({"pipeline": "no/such/pipeline"}, "no pipeline 'no/such/pipeline'"),
        ({"adapter": "no/such/adapter"}, "no adapter 'no/such/adapter'"),
    ],
)
def test_wrong_options(pipeline_folder, changes, message, tmp_path):
    made = config(pipeline_folder, tmp_path / "out")
    if changes.get("target"):
        changes = {"scale": None, **changes}
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message):
        upscale.upscale(UpscaleConfig(**{**vars(made), **changes}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pipeline_folder", ["sd15"], indirect=True)
def test_an_odd_image_and_a_scheduler_of_two_predictions(pipeline_folder, tmp_path):
    noise_image(33, 50).save(tmp_path / "given.png")
    with pytest.raises(ValueError, match="scale must give multiples of 8, 2 times 33x50 is 66x100; give a target"):
        upscale.upscale(config(pipeline_folder, tmp_path / "out", image=str(tmp_path / "given.png")))
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "heun")
    with pytest.raises(ValueError, match="a scheduler with one prediction in a step, not HeunDiscreteScheduler"):
        upscale.upscale(config(tmp_path / "heun", tmp_path / "out", skip_residual=True))


@pytest.mark.parametrize("pipeline_folder", ["sd15"], indirect=True)
def test_out_of_memory_says_what_helps(pipeline_folder, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(upscale, "image_to_image", fail)
    savers = "dtype bfloat16, vae_tiling on, split_guidance on, chunked_feed_forward on, dilated_batch 1, offload model"
    with pytest.raises(MemoryError, match=f"what saves some: {savers}"):
        upscale.upscale(config(pipeline_folder, tmp_path / "out", dilated=True))
    assert list(images(tmp_path / "out")) == ["base.png"]


def test_several_processes_are_refused(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="upscale runs in one process, got WORLD_SIZE 2"):
        upscale.upscale(config(pipeline_folder, tmp_path / "out"))
