"""The demonstration, in a few steps of everything: what it writes, and what reads its digits."""

import json

import numpy as np
import t2i_digits as demo
from diffusers import DiffusionPipeline
from PIL import Image
from t2i_teacher import SIZE, build_pipeline, draw_digits


def test_digits_read_as_their_captions_say():
    images, captions = draw_digits()
    assert images.shape == (1797, *SIZE)
    reader = demo.Reader()
    assert reader.accuracy > 0.98
    right = [
        f"a handwritten {demo.NAMES[reader.read(Image.fromarray(pixels.numpy()))]}" == caption
        for pixels, caption in zip(images[::20], captions[::20], strict=True)
    ]
    assert np.mean(right) > 0.97


def test_every_word_is_a_token():
    pipeline = build_pipeline()
    for text in demo.prompts(1):
        ids = pipeline.tokenizer(text).input_ids
        assert len(ids) == 2 + len(text.split())
        assert pipeline.tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_demonstration(tmp_path, capsys):
    few = {"vae_steps": 2, "teacher_steps": 2, "clip_steps": 2, "steps": 2, "sampler_steps": 1, "times": 1}
    few |= {"count": 100}
    results = demo.run(tmp_path / "out", **few)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["digit_accuracy"]) == set(results["clip"]) == {"teacher", "student", "untrained"}
    assert results["noise_error"]["untrained"] > 0
    with Image.open(tmp_path / "out" / "sheet.png") as page:
        assert page.size == (1528, 300)
    with Image.open(tmp_path / "out" / "enlarged" / "step-128x128.png") as image:
        assert image.size == (128, 128)
    assert "of the untrained mixers'" in capsys.readouterr().out
    # Once more, everything is there.
    before = (tmp_path / "out" / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    again = demo.run(tmp_path / "out", **few)
    assert again["digit_accuracy"] == results["digit_accuracy"]
    assert (tmp_path / "out" / "teacher" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert DiffusionPipeline.from_pretrained(tmp_path / "out" / "teacher").unet.config.cross_attention_dim == 64
