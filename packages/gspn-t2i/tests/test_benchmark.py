"""Counting and measuring: known counts, the true architectures, the table and the files."""

import json

import pytest
import torch
from PIL import Image
from t2i_cases import UNETS, inputs, sd_unet
from torch import nn
from torch.nn import functional as F

from gspn_core.runs.options import make
from gspn_t2i import GSPNAdapter, architectures, benchmark, cli, tiny
from gspn_t2i.config import BenchmarkConfig
from gspn_t2i.counting import count


def config(**changes):
    return make(BenchmarkConfig, {"precision": "fp32", "progress": False, "measure_up_to": 0, **changes})


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
    options = config(family="sd15", image_sizes=["1024", "16384x8192"])
    rows = {(row.mixer, row.width): row for row in benchmark.measure(options)}
    assert all(row.seconds is None for row in rows.values())
    pixels = 16384 * 8192 / 1024**2
    grown = {mixer: rows[mixer, 8192].flops / rows[mixer, 1024].flops for mixer in options.mixers}
    assert grown["softmax"] > 10 * pixels
    assert grown["gspn"] == pytest.approx(pixels, rel=0.05) and grown["gspn2"] == pytest.approx(pixels, rel=0.05)


@pytest.fixture
def tiny_models(monkeypatch):
    """In place of the true architectures, which take gigabytes."""
    monkeypatch.setattr(architectures, "make_unet", lambda family, **options: UNETS[family]().to(**options))
    monkeypatch.setattr(architectures, "make_vae", lambda family, **options: tiny.make_vae().to(**options))


def test_measured(tiny_models, tmp_path, capsys):
    words = ["--family", "sd15", "--image-sizes", "64x128", "128", "--measure-up-to", str(64 * 128), "--repeats", "1"]
    words += ["--generation", "--sampler-steps", "2", "--precision", "fp32", "--chunk-size", "null", "--no-progress"]
    files = ["--out", str(tmp_path / "new" / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert cli.main(["benchmark", *words, *files]) == 0
    text = capsys.readouterr().out
    assert text.count("not run") == 6 and text.count("GiB") == 24 and "gspn2" in text
    results = json.loads((tmp_path / "new" / "a.json").read_text())
    rows = results["rows"]
    assert [(row["mixer"], row["width"], row["height"], row["seconds"] is None) for row in rows[:2]] == [
        ("softmax", 128, 64, False),
        ("softmax", 128, 128, True),
    ]
    assert all((row["generation_seconds"] is None) == (row["seconds"] is None) for row in rows)
    assert len(rows) == 6 and results["versions"]["torch"] == torch.__version__
    assert results["config"]["image_sizes"] == ["64x128", "128x128"] and results["config"]["chunk_size"] is None
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000


def test_out_of_memory_is_a_row_of_the_table(tiny_models, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(benchmark, "_timed", fail)
    options = config(family="sd15", image_sizes=["64"], mixers=["gspn2"], measure_up_to=64 * 64)
    result = benchmark.benchmark(options)
    assert result["rows"][0]["error"] == "out of memory: tried to allocate much"
    assert "no memory" in benchmark.as_text(result)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_whole_image(family, tiny_models):
    """Is the steps, with and without the prompt, and the decoding: of one piece, or of tiles side by side."""
    options = config(family=family, image_sizes=["64", "1024x1032"], mixers=["softmax"], sampler_steps=7)
    small, large = benchmark.measure(options)
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


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"image_sizes": ["100x64"]}, "image_sizes must be multiples of 8, got 100x64"),
        ({"image_sizes": ["0x8"]}, r"image_sizes.*HEIGHTxWIDTH.*got '0x8'"),
        ({"mixers": ["mamba"]}, r"mixers.*softmax.*mamba"),
        ({"mixers": []}, "image_sizes and mixers must not be empty"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
