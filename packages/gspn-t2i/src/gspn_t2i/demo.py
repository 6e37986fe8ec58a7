"""A demonstration: a tiny Stable Diffusion learns handwritten digits, and GSPN-2 learns from it to draw them.

python -m gspn_t2i.demo --out demo-t2i-output

Everything is here to be seen: a pipeline of diffusers with softmax attention is trained on captioned digits
(scikit-learn's), distilled into mixers by `distill`, both draw the same prompts, and a classifier of real digits reads
what they drew. What was done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch.nn import functional as F

from .adapter import GSPNAdapter
from .captions import open_captioned
from .conditions import Frozen, Pixels
from .config import DistillConfig, find, make
from .digits import NAMES, SIZE, draw_digits, make_clip, make_teacher, write_images
from .distill import distill
from .evaluate import EvaluateConfig, evaluate
from .files import save_png, write_text
from .generate import GenerateConfig, generate
from .objective import training_schedule
from .upscale import UpscaleConfig, upscale

GUIDANCE = 4.0


@torch.no_grad()
def noise_error(folder: Path, adapter: GSPNAdapter, data: Pixels, count: int = 200) -> float:
    """Return the mean squared difference between the answers of a UNet with and without mixers, on noised images."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    frozen, schedule = Frozen(pipeline, torch.device("cpu")), training_schedule(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    items = [data[int(index)] for index in torch.randperm(len(data), generator=generator)[:count]]
    moments = frozen.moments(torch.stack([item.image for item in items]))
    shape = (count, moments.shape[1] // 2, *moments.shape[2:])
    noise, posterior = (torch.randn(shape, generator=generator) for _ in range(2))
    times = torch.randint(1000, (count,), generator=generator)
    noisy = schedule.add_noise(frozen.latents(moments, posterior), noise, times)
    states = frozen.embed([str(item.caption) for item in items]).states
    expected = pipeline.unet(noisy, times, encoder_hidden_states=states).sample
    adapter.mount(pipeline.unet)
    found = pipeline.unet(noisy, times, encoder_hidden_states=states).sample
    adapter.unmount()
    return F.mse_loss(found, expected).item()


class Reader:
    """A classifier of real digits, trained on half of them, which reads drawn ones."""

    def __init__(self) -> None:
        data = load_digits()
        pixels = data.images.reshape(len(data.images), -1)
        self.machine = SVC(gamma=0.001).fit(pixels[::2], data.target[::2])
        self.accuracy = float(self.machine.score(pixels[1::2], data.target[1::2]))  # on the other half

    def read(self, image: Image.Image) -> int:
        """Return the digit that a square image shows."""
        values = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
        return int(self.machine.predict(values.reshape(1, -1))[0])


def prompts(times: int) -> list[str]:
    """Return what is drawn for the measurement: each digit so many times, in turn."""
    return [f"a handwritten {name}" for name in NAMES] * times


def digit_accuracy(folder: Path, reader: Reader, count: int) -> float:
    """Return the share of images that are read as asked for."""
    right = 0
    for index in range(count):
        with Image.open(folder / f"{index:06d}.png") as image:
            right += reader.read(image) == index % 10
    return right / count


def sheet(teacher: Path, student: Path, path: Path, count: int) -> None:
    """Write a page of what both drew of the same prompts from the same noise, three of each digit."""
    page = Image.new("RGB", (10 * 152 + 8, 24 + 3 * 92), "white")
    pen = ImageDraw.Draw(page)
    heading = "of each prompt left: the teacher, with softmax attention; right: the student, with GSPN-2"
    pen.text((8, 6), heading, fill="black")
    for index in range(min(30, count)):
        left, top = 8 + index % 10 * 152, 24 + index // 10 * 92
        pen.text((left, top), f"a handwritten {NAMES[index % 10]}", fill="black")
        for place, folder in enumerate((teacher, student)):
            with Image.open(folder / f"{index:06d}.png") as image:
                page.paste(image.resize((64, 64), Image.Resampling.NEAREST), (left + place * 68, top + 18))
    save_png(page, path)


def run(
    out: str | Path,
    *,
    vae_steps: int = 300,
    teacher_steps: int = 1200,
    clip_steps: int = 300,
    steps: int | None = None,
    sampler_steps: int = 25,
    times: int = 20,
) -> dict[str, Any]:
    """Train a teacher, distil it, draw, enlarge and measure.

    Args:
        out: folder for everything; what is done in it already is kept.
        vae_steps: updates of the autoencoder.
        teacher_steps: updates of the teacher.
        clip_steps: updates of a CLIP that measures.
        steps: of the distillation, other than the configuration's.
        sampler_steps: per image.
        times: that each digit is drawn.

    Returns:
        The figures that are printed.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images, captions = draw_digits()
    if not (out / "images").is_dir():
        write_images(out / "images", images, captions)
    teacher = out / "teacher"
    seconds = make_teacher(teacher, images, captions, vae_steps=vae_steps, steps=teacher_steps)
    values = yaml.safe_load(Path(find("digits")).read_text(encoding="utf-8"))
    values |= {
        "pipeline": str(teacher),
        "data": str(out / "images"),
        "cache": str(out / "cache"),
        "out": str(out / "run"),
    }
    if steps is not None:
        values |= {"steps": steps, "warmup_steps": min(values["warmup_steps"], steps - 1)}
    config = make(DistillConfig, values)
    summary = distill(config)
    texts = out / "prompts.txt"
    write_text(texts, "\n".join(prompts(times)))

    def draw(adapter: Path | None, name: str) -> Path:
        options: dict[str, Any] = {
            "pipeline": str(teacher),
            "adapter": adapter and str(adapter),
            "prompt_file": str(texts),
        }
        options |= {
            "height": SIZE[0],
            "width": SIZE[1],
            "steps": sampler_steps,
            "guidance": GUIDANCE,
            "batch_size": 100,
        }
        generate(make(GenerateConfig, options | {"out": str(out / name)}))
        return out / name

    torch.manual_seed(0)
    names = ("mixer", "proxy", "bottleneck", "chunk_size", "init", "keep_attention")
    options = {name: getattr(config, name) for name in names}
    untrained = GSPNAdapter.for_unet(DiffusionPipeline.from_pretrained(teacher).unet, **options)
    untrained.save_pretrained(out / "untrained")
    student = Path(summary["adapter"])
    folders = {"teacher": draw(None, "by-teacher"), "student": draw(student, "by-student")}
    folders["untrained"] = draw(out / "untrained", "by-untrained")
    sheet(folders["teacher"], folders["student"], out / "sheet.png", 10 * times)
    enlarge: dict[str, Any] = {
        "pipeline": str(teacher),
        "adapter": str(student),
        "image": str(folders["student"] / "000007.png"),
    }
    enlarge |= {
        "prompt": prompts(times)[7],
        "scale": 4,
        "strengths": [0.1, 0.1],  # the teacher has seen no larger images
        "guidance": GUIDANCE,
        "out": str(out / "enlarged"),
    }
    enlarged = upscale(make(UpscaleConfig, enlarge))

    clip = make_clip(out / "clip", images, captions, clip_steps)

    def measure(folder: Path) -> dict[str, float]:
        options = {"images": str(folder), "captions": str(texts), "metrics": ["clip_fid", "clip_t"], **clip}
        options |= {"reference": str(out / "images"), "prefix": "", "out": str(folder / "evaluation")}
        found = evaluate(make(EvaluateConfig, options))
        return {name: found[name] for name in ("clip_fid", "clip_t")}

    reader = Reader()
    data = Pixels(open_captioned(str(out / "images")), SIZE)
    results = {
        "teacher_parameters": sum(p.numel() for p in DiffusionPipeline.from_pretrained(teacher).unet.parameters()),
        "mixer_parameters": summary["parameters"],
        "teacher_seconds": seconds,
        "distillation_seconds": summary["seconds"],
        "classifier_accuracy": reader.accuracy,
        "digit_accuracy": {name: digit_accuracy(folder, reader, 10 * times) for name, folder in folders.items()},
        "clip": {name: measure(folder) for name, folder in folders.items()},
        "noise_error": {
            "untrained": noise_error(teacher, untrained, data),
            "student": noise_error(teacher, GSPNAdapter.from_pretrained(student), data),
        },
    }
    write_text(out / "results.json", json.dumps(results, indent=1))
    _print(results, out, enlarged)
    return results


def _print(results: dict[str, Any], out: Path, enlarged: dict[str, Any]) -> None:
    for name, share in results["digit_accuracy"].items():
        print(f"digits read as asked for, {name}: {100 * share:.1f}%")
    for name, found in results["clip"].items():
        print(f"by a CLIP of these images, {name}: FID {found['clip_fid']:.3f}, CLIP-T {found['clip_t']:.3f}")
    errors = results["noise_error"]
    share = errors["student"] / errors["untrained"]
    print(f"error against the teacher's noise: {errors['student']:.5f}, {share:.2f} of the untrained mixers'")
    print("see:", out / "sheet.png", enlarged["image"], sep="\n  ")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(prog="python -m gspn_t2i.demo", description=__doc__)
    parser.add_argument("--out", default="demo-t2i-output", help="folder for everything (default: %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=300, help="of the autoencoder (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=1200, help="of the teacher (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the distillation, other than the configuration's")
    arguments = parser.parse_args(argv)
    run(arguments.out, vae_steps=arguments.vae_steps, teacher_steps=arguments.teacher_steps, steps=arguments.steps)


if __name__ == "__main__":
    main()
