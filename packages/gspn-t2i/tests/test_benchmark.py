"""Counting and measuring: known counts, the true architectures, the table and the files."""

import json

import pytest
import torch
from PIL import Image
from t2i_cases import UNETS, inputs, sd_unet
from torch import nn
from torch.nn import functional as F

from gspn_t2i import GSPNAdapter, architectures, benchmark, tiny
from gspn_t2i.benchmark import BenchmarkConfig, parse_size
from gspn_t2i.counting import count


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_known_counts(device):
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False)).to(device)
    x = torch.zeros(7, 10, device=device)
    counts = count(model, lambda: model(x))
    assert counts.flops == 2 * 7 * (10 * 20 + 20 * 5)
    assert counts.weight_bytes == 4 * (200 + 100)
    # Both sides of the ReLU live at once; what went before is gone.
    assert counts.activation_bytes == 4 * 2 * 7 * 20


def test_views_and_inputs_count_once():
    x = torch.zeros(8, 8, device="meta")

    def call():
        y = x.t().reshape(-1)  # a copy of 256 bytes
        return y.view(8, 8)[2:].unsqueeze(0)

    assert count(nn.Identity(), call).activation_bytes == 256


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_softmax_attention_is_counted_without_its_matrix(device):
    q = torch.zeros(1, 2, 1000, 16, device=device)
    counts = count(nn.Identity(), lambda: F.scaled_dot_product_attention(q, q, q))
    assert counts.flops == 2 * 2 * 2 * 1000 * 1000 * 16
    assert counts.activation_bytes == 4 * 2 * 1000 * 16


@pytest.mark.parametrize("mixer", [None, "gspn", "gspn2"])
def test_meta_counts_what_the_cpu_does(mixer):
    counted = []
    for device in ("cpu", "meta"):
        unet = sd_unet().to(device)
        if mixer:
            with torch.device(device):
                GSPNAdapter.for_unet(unet, mixer=mixer, init="random").mount(unet)
        values = {key: value.to(device) for key, value in inputs(unet).items()}
        counted.append(count(unet, lambda unet=unet, values=values: unet(**values)))
    assert counted[0].flops == counted[1].flops
    assert counted[0].activation_bytes == pytest.approx(counted[1].activation_bytes, rel=0.05)


@pytest.mark.parametrize("family,parameters", [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_true_architectures(family, parameters):
    unet = architectures.make_unet(family, device="meta")
    assert sum(p.numel() for p in unet.parameters()) == parameters
    with pytest.raises(ValueError, match="height and width must be multiples of 8, got 100 x 64"):
        architectures.make_inputs(unet, 100, 64)


def test_softmax_grows_with_the_square_and_scans_with_the_pixels():
    options = {"family": "sd15", "sizes": ("1024x1024", "16384x8192"), "measure_up_to": 0, "progress": False}
    rows = {(row.mixer, row.width): row for row in benchmark.measure(BenchmarkConfig(**options))}
    assert all(row.seconds is None for row in rows.values())
    pixels = 16384 * 8192 / 1024**2
    grown = {mixer: rows[mixer, 8192].flops / rows[mixer, 1024].flops for mixer in benchmark.MIXERS}
    assert grown["softmax"] > 10 * pixels
    assert grown["gspn"] == pytest.approx(pixels, rel=0.05) and grown["gspn2"] == pytest.approx(pixels, rel=0.05)


def test_measured(tmp_path, monkeypatch, capsys):
    """On tiny architectures in place of the true ones, which take gigabytes."""

    def make_unet(family, *, device, dtype):
        return sd_unet().to(device=device, dtype=dtype)

    def make_vae(family, *, device, dtype):
        return tiny.make_vae().to(device=device, dtype=dtype)

    monkeypatch.setattr(architectures, "make_unet", make_unet)
    monkeypatch.setattr(architectures, "make_vae", make_vae)
    options = {"family": "sd15", "sizes": ("64x128", "128x128"), "measure_up_to": 64 * 128, "repeats": 1}
    options |= {"generation": True, "steps": 2}
    files = {"json": str(tmp_path / "a.json"), "plot": str(tmp_path / "a.png")}
    rows = benchmark.benchmark(BenchmarkConfig(**options, **files, dtype="float32", progress=False))
    assert [(row.mixer, row.width, row.height, row.seconds is None) for row in rows[:2]] == [
        ("softmax", 128, 64, False),
        ("softmax", 128, 128, True),
    ]
    out = capsys.readouterr().out
    assert out.count("not run") == 6 and out.count("GiB") == 24 and "gspn2" in out
    assert all((row.generation_seconds is None) == (row.seconds is None) for row in rows)
    saved = json.loads((tmp_path / "a.json").read_text())
    assert len(saved["rows"]) == 6 and saved["versions"]["torch"] == torch.__version__
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_whole_image(family, monkeypatch):
    """Is the steps, with and without the prompt, and the decoding: of one piece, or of tiles side by side."""
    monkeypatch.setattr(architectures, "make_unet", lambda family, **options: UNETS[family]().to(**options))
    monkeypatch.setattr(architectures, "make_vae", lambda family, **options: tiny.make_vae().to(**options))
    sizes = {"family": family, "sizes": ("64x64", "1024x1032"), "mixers": ("softmax",), "measure_up_to": 0}
    small, large = benchmark.measure(BenchmarkConfig(**sizes, steps=7, dtype="float32", progress=False))
    vae, latents = tiny.make_vae(), torch.zeros(1, 4, 8, 8)
    decoding = count(vae, lambda: vae.decode(latents))
    assert small.generation_flops == 14 * small.flops + decoding.flops
    most = max(2 * small.activation_bytes, decoding.activation_bytes)
    weights = small.weight_bytes + decoding.weight_bytes
    assert small.generation_bytes == pytest.approx(weights + most, rel=0.02)
    # Tiles of 8 x 8 latents, every six rows and columns of 128 x 129.
    assert large.generation_flops == 14 * large.flops + 22 * 22 * decoding.flops


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_true_autoencoders(family):
    vae = architectures.make_vae(family, device="meta")
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert vae.tile_latent_min_size == {"sd15": 64, "sdxl": 128}[family]


@pytest.mark.parametrize("size", ["1024", "1024x", "axb", "0x8", "100x64"])
def test_wrong_sizes(size):
    with pytest.raises(ValueError, match="sizes must be"):
        parse_size(size)
    with pytest.raises(ValueError, match="sizes must be"):
        BenchmarkConfig(sizes=(size,))
