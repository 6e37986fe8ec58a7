"""Sampling: schedulers, guidance, the same images whatever the processes and interruptions, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from dit_cases import tiny_model
from PIL import Image

from gspn_core.runs.options import make
from gspn_dit.config import SampleConfig
from gspn_dit.sample import generate, grid, guide, read_png, sample, to_pixels, write_npz
from gspn_dit.samplers import make_scheduler, run_sampler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pixel-space model of five classes, as a diffusers folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(in_channels=1).save_pretrained(folder)
    return folder


def options(model, out, **changes):
    values = {
        "checkpoint": str(model),
        "out": str(out),
        "count": 7,
        "sampler_steps": 3,
        "guidance": 2.0,
        "batch_size": 3,
    }
    return values | {"progress": False, **changes}


def images(out):
    return {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}


# ---- steps


def test_ancestral_steps_are_those_of_respaced_diffusion():
    """Betas of the kept times from the product of alphas, posterior mean, variance between the two bounds."""
    torch.manual_seed(0)
    scheduler = make_scheduler("ancestral", 10)
    kept = scheduler.timesteps.flip(0)
    assert kept.tolist() == np.linspace(0, 999, 10).round().astype(int).tolist()
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[kept]
    before = torch.cat((torch.ones(1).double(), product[:-1]))
    betas = 1 - product / before
    for place in (9, 4, 1, 0):
        x, output = torch.randn(2, 1, 4, 4), torch.randn(2, 2, 4, 4)
        predicted, v = output.double().chunk(2, dim=1)
        x0 = (x - (1 - product[place]).sqrt() * predicted) / product[place].sqrt()
        mean = betas[place] * before[place].sqrt() / (1 - product[place]) * x0
        mean = mean + (1 - before[place]) * (1 - betas[place]).sqrt() / (1 - product[place]) * x
        posterior = (betas * (1 - before) / (1 - product)).clamp(min=1e-20)[place]
        share = (v + 1) / 2
        scale = (0.5 * (share * betas[place].log() + (1 - share) * posterior.log())).exp()
        noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        expected = mean if place == 0 else mean + scale * noise
        generator = torch.Generator().manual_seed(5)
        ours = scheduler.step(output, kept[place], x, generator=generator).prev_sample
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_euler_and_heun_integrate_a_known_field():
    """The velocity of a point mass at m is (x - m) / s: every straight path ends in m."""
    for sampler in ("euler", "heun"):
        scheduler = make_scheduler(sampler, 8)
        x = torch.randn(2, 1, 3, 3)
        for t in scheduler.timesteps:
            x = scheduler.step((x - 0.7) / (t / 1000), t, x).prev_sample
        torch.testing.assert_close(x, torch.full_like(x, 0.7), rtol=1e-4, atol=2e-3)


def test_ddim_without_noise_is_exact_for_the_true_noise():
    scheduler = make_scheduler("ddim", 20)
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x0, eps = torch.full((1, 1, 2, 2), 0.3), torch.randn(1, 1, 2, 2)
    x = product[999].sqrt().float() * x0 + (1 - product[999]).sqrt().float() * eps
    for t in scheduler.timesteps:
        x = scheduler.step(eps, t, x).prev_sample
    # Its last step goes to abar = 1.
    torch.testing.assert_close(x, x0, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("steps", [30, 150, 300, 600, 1000])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "euler", "heun", "sde", "dopri5"])
def test_samplers_draw_a_known_gaussian(sampler, steps):
    """With the exact denoiser of N(0.7, 0.5^2) samples have that mean and deviation, whether steps divide 1000 or not.

    The tolerance at 30 steps is the samplers' own error: first-order steps shrink the deviation.
    """
    mean, deviation = 0.7, 0.5
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()

    def predict(x, t):
        if sampler in ("ancestral", "ddim"):
            signal, noise = product[int(t)].sqrt(), (1 - product[int(t)]).sqrt()
            output = noise * (x - signal * mean) / (product[int(t)] * deviation**2 + noise**2)
            return torch.cat((output, torch.ones_like(output)), dim=1)  # the larger of the two bounds of the variance
        s = float(t) / 1000
        return (s - (1 - s) * deviation**2) / ((1 - s) ** 2 * deviation**2 + s**2) * (x - (1 - s) * mean) - mean

    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std()
    x = run_sampler(sampler, predict, x, steps=steps, generator=torch.Generator().manual_seed(1))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(deviation, abs=0.05 if steps == 30 else 0.015)


def test_the_adaptive_sampler_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ValueError, match="sampler 'dopri5' needs torchdiffeq: pip install torchdiffeq"):
        run_sampler("dopri5", lambda x, t: x, torch.zeros(1), steps=1)


def test_guidance_on_an_interval():
    """Outside the interval samples are those without guidance."""
    model = tiny_model(in_channels=1)

    def draw(guidance, interval):
        options = {"sampler": "ddim", "steps": 4, "guidance": guidance, "guidance_interval": interval}
        return generate(model, [1, 2], [0, 1], **options)

    assert torch.equal(draw(3.0, (0.0, 0.1)), draw(1.0, (0.0, 1.0)))
    assert not torch.allclose(draw(3.0, (0.2, 0.6)), draw(1.0, (0.0, 1.0)))
    assert not torch.allclose(draw(3.0, (0.2, 0.6)), draw(3.0, (0.0, 1.0)))


def test_guidance():
    output = torch.arange(24).float().view(2, 6, 1, 2)
    conditional, null = output[:1], output[1:]
    out = guide(output, 3.0, 2)
    assert torch.equal(out[:, :2], null[:, :2] + 3 * (conditional[:, :2] - null[:, :2]))
    assert torch.equal(out[:, 2:], conditional[:, 2:])
    assert torch.equal(guide(output, 1.0, 3), conditional)


# ---- samples


def test_a_sample_depends_on_seed_index_and_class():
    model = tiny_model(in_channels=1)

    def draw(labels, indices, **more):
        return generate(model, labels, indices, **{"sampler": "ancestral", "steps": 3, "guidance": 2.0, **more})

    x = draw([0, 1, 2, 3], range(4))
    assert x.shape == (4, 1, 8, 8) and x.isfinite().all()
    torch.testing.assert_close(draw([2, 1], [2, 1]), x[[2, 1]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw([0, 1, 2, 3], range(4), seed=1), x)
    assert not torch.allclose(draw([1, 1, 2, 3], range(4))[0], x[0])
    assert not torch.allclose(draw([0, 1, 2, 3], range(4), guidance=1.0), x)
    assert draw([0], [0], size=(4, 12)).shape == (1, 1, 4, 12)


def test_guidance_of_some_channels():
    model = tiny_model()
    arguments = (model, [1], [0])
    some, every = (
        generate(*arguments, sampler="ddim", steps=1, guidance=4.0, guidance_channels=channels)
        for channels in (3, None)
    )
    assert torch.equal(some[:, :3], every[:, :3])
    assert not torch.equal(some[:, 3], every[:, 3])


def test_a_folder(model, tmp_path):
    summary = sample(make(SampleConfig, options(model, tmp_path, npz=True, grid=4)))
    assert (summary["images"], summary["drawn"]) == (7, 7)
    assert list(images(tmp_path)) == [f"{i:06d}.png" for i in range(7)]
    assert json.loads((tmp_path / "labels.json").read_text()) == [0, 1, 2, 3, 4, 0, 1]
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        stored = archive["arr_0"]
    assert (stored.dtype, stored.shape) == (np.uint8, (7, 8, 8, 3))
    assert (stored[3] == read_png(tmp_path / "images" / "000003.png")).all()
    assert read_png(tmp_path / "grid.png").shape == (130, 130, 3)
    before = images(tmp_path)
    assert sample(make(SampleConfig, options(model, tmp_path)))["drawn"] == 0
    (tmp_path / "images" / "000004.png").unlink()
    assert sample(make(SampleConfig, options(model, tmp_path)))["drawn"] == 3
    assert images(tmp_path) == before


def test_more_images_but_not_fewer(model, tmp_path):
    sample(make(SampleConfig, options(model, tmp_path / "out")))
    before = images(tmp_path / "out")
    assert sample(make(SampleConfig, options(model, tmp_path / "out", count=10)))["drawn"] == 4
    assert {name: content for name, content in images(tmp_path / "out").items() if name in before} == before
    assert len(images(tmp_path / "out")) == len(json.loads((tmp_path / "out" / "labels.json").read_text())) == 10
    with pytest.raises(ValueError, match=r"count must be at least the 10 images in .*, got 7"):
        sample(make(SampleConfig, options(model, tmp_path / "out")))


def test_other_weights_in_the_place_of_the_checkpoint(tmp_path):
    """A model trained anew in the same folder is another one; the same model elsewhere is not."""
    tiny_model(in_channels=1).save_pretrained(tmp_path / "model")
    sample(make(SampleConfig, options(tmp_path / "model", tmp_path / "out")))
    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert sample(make(SampleConfig, options(tmp_path / "moved", tmp_path / "out")))["drawn"] == 0
    tiny_model(seed=1, in_channels=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds results of other settings: checkpoint_sha256 was"):
        sample(make(SampleConfig, options(tmp_path / "model", tmp_path / "out")))


def test_two_processes_draw_the_same_bits(model, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    (tmp_path / "program.py").write_text(
        "import sys, accelerate\nfrom gspn_dit import cli\n"
        "assert cli.main(sys.argv[2:]) == 0\n"
        "assert accelerate.PartialState().num_processes == int(sys.argv[1])\n"
        "import torch\nassert not torch.distributed.is_initialized()\n"  # or its threads may abort the process
    )
    for count in (1, 2):
        file = tmp_path / f"{count}.yaml"
        file.write_text(yaml.safe_dump(options(model, tmp_path / str(count))))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*launch, str(tmp_path / "program.py"), str(count), "sample", "--config", str(file), "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count('"images": 7') == 1
    assert images(tmp_path / "1") == images(tmp_path / "2")
    assert len(images(tmp_path / "1")) == 7


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde", "dopri5"])
def test_flow(sampler, tmp_path):
    tiny_model(in_channels=3, out_channels=3).save_pretrained(tmp_path / "model")
    values = options(
        tmp_path / "model", tmp_path / "out", sampler=sampler, image_size=[4, 12], classes=[4, "2"], grid=None
    )
    sample(make(SampleConfig, values))
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == [4, 2, 4, 2, 4, 2, 4]
    assert read_png(tmp_path / "out" / "images" / "000000.png").shape == (4, 12, 3)
    assert not (tmp_path / "out" / "grid.png").exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"checkpoint": "nowhere"}, "no checkpoint in 'nowhere'"),
        ({"classes": [5]}, "classes must be from 0 to 4, got 5"),
        ({"classes": [-1]}, "classes must be from 0 to 4, got -1"),
        ({"classes": ["cat"]}, "classes must be numbers or among 0, 1, 2, 3, 4, got 'cat'"),
        ({"sampler": "euler"}, "sampler must be one of ancestral, ddim for a model of noise, got 'euler'"),
        ({"image_size": [8, 7]}, "image_size must be multiples of 2"),
        ({"sampler_steps": 1001}, "sampler_steps must be at most 1000"),
        ({"count": 0}, "count"),
        ({"weights": "ema"}, "no diffusion_pytorch_model.ema.safetensors"),
    ],
)
def test_wrong_options(model, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample(make(SampleConfig, options(model, tmp_path / "out", **changes)))
    assert not list((tmp_path / "out").glob("images/*.png"))


def test_latents_need_a_vae(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vae must be given: the model makes latents"):
        sample(make(SampleConfig, options(tmp_path, tmp_path / "out")))


def test_other_samples_in_the_folder(model, tmp_path):
    sample(make(SampleConfig, options(model, tmp_path)))
    with pytest.raises(
        ValueError, match=r"holds results of other settings: guidance was 2\.0, is 3\.0; give another folder"
    ):
        sample(make(SampleConfig, options(model, tmp_path, guidance=3.0)))


def test_another_model_in_the_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ValueError, match="holds a DiTTransformer2DModel, not a GSPNDiTTransformer2DModel"):
        sample(make(SampleConfig, options(tmp_path, tmp_path / "out")))


# ---- pictures


def test_pixels():
    x = torch.tensor([-2.0, -1, 0, 1]).view(1, 1, 2, 2)
    assert to_pixels(x)[0, ..., 1].tolist() == [[0, 0], [128, 255]]
    assert to_pixels(x).shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        to_pixels(torch.zeros(1, 4, 2, 2))


def test_grid():
    pages = grid(np.stack([np.full((32, 48, 3), value, np.uint8) for value in (10, 20, 30)]))
    assert pages.shape == (2 * 64 + 2, 2 * 96 + 2, 3)
    assert [pages[0, 0, 0], pages[0, 98, 0], pages[66, 0, 0], pages[66, 98, 0]] == [10, 20, 30, 255]


def test_npz_is_numpys_own(tmp_path):
    files = []
    for value in range(3):
        files.append(tmp_path / f"{value}.png")
        Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(files[-1])
    write_npz(files, tmp_path / "a.npz")
    expected = np.stack([read_png(file) for file in files])
    np.savez(tmp_path / "b.npz", expected)
    with np.load(tmp_path / "a.npz") as archive:
        assert (archive["arr_0"] == expected).all()
    members = [zipfile.ZipFile(tmp_path / name).read("arr_0.npy") for name in ("a.npz", "b.npz")]
    assert members[0] == members[1]
