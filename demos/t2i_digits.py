"""A demonstration: a tiny Stable Diffusion learns handwritten digits, and GSPN-2 learns from it to draw them.

python demos/t2i_digits.py --out demo-t2i-output

A diffusers pipeline with softmax attention is trained on captioned digits (scikit-learn's) and distilled into mixers by
`distill`; both draw the same prompts, and a classifier of real digits reads the drawn ones. Finished parts are not
repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from t2i_teacher import NAMES, SIZE, draw_digits, make_clip, make_teacher, write_images
from torch.nn import functional as F

from gspn_core.runs.files import write_json, write_text
from gspn_core.runs.options import make, read_config
from gspn_t2i import GSPNAdapter
from gspn_t2i.captions import open_captioned
from gspn_t2i.conditions import Frozen, Pixels
from gspn_t2i.config import DistillConfig, EvaluateConfig, GenerateConfig
from gspn_t2i.distill import distill
from gspn_t2i.evaluate import evaluate
from gspn_t2i.generate import generate
from gspn_t2i.objective import training_schedule
from gspn_t2i.pipelines import save_png
from gspn_t2i.scaling import UpscaleConfig
from gspn_t2i.upscale import upscale

GUIDANCE = 4.0


@torch.no_grad()
def noise_error(folder: Path, adapter: GSPNAdapter, data: Pixels, count: int = 200) -> float:
    """Return the mean squared difference of the predictions of a UNet with and without mixers, for noised images."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    frozen, schedule = Frozen(pipeline, torch.device("cpu")), training_schedule(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    items = [data[int(index)] for index in torch.randperm(len(data), generator=generator)[:count]]
    count = len(items)
    moments = frozen.moments(torch.stack([item.image for item in items]))
    shape = (count, moments.shape[1] // 2, *moments.shape[2:])
    noise, posterior = (torch.randn(shape, generator=generator) for _ in range(2))
    times = torch.randint(1000, (count,), generator=generator)
    noisy = schedule.add_noise(frozen.latents(moments, posterior), noise, times)
    states = frozen.embed([str(item.caption) for item in items]).states
    expected = pipeline.unet(noisy, times, encoder_hidden_states=states).sample
    adapter.mount(pipeline.unet)
    predicted = pipeline.unet(noisy, times, encoder_hidden_states=states).sample
    adapter.unmount()
    return F.mse_loss(predicted, expected).item()


class Reader:
    """A classifier of digits, trained on half of the real ones."""

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
    """Return the prompts of the measurement: all digits in turn, so many times."""
    return [f"a handwritten {name}" for name in NAMES] * times


def digit_accuracy(folder: Path, reader: Reader, count: int) -> float:
    """Return the share of images that are read as their prompts."""
    right = 0
    for index in range(count):
        with Image.open(folder / "images" / f"{index:06d}.png") as image:
            right += reader.read(image) == index % 10
    return right / count


def sheet(teacher: Path, student: Path, path: Path, count: int) -> None:
    """Write a page of images that both drew of the same prompts from the same noise, three of each digit."""
    page = Image.new("RGB", (10 * 152 + 8, 24 + 3 * 92), "white")
    pen = ImageDraw.Draw(page)
    heading = "of each prompt left: the teacher, with softmax attention; right: the student, with GSPN-2"
    pen.text((8, 6), heading, fill="black")
    for index in range(min(30, count)):
        left, top = 8 + index % 10 * 152, 24 + index // 10 * 92
        pen.text((left, top), f"a handwritten {NAMES[index % 10]}", fill="black")
        for place, folder in enumerate((teacher, student)):
            with Image.open(folder / "images" / f"{index:06d}.png") as image:
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
    count: int | None = None,
) -> dict[str, Any]:
    """Train a teacher, distil it, draw, enlarge and measure.

    Args:
        out: folder for everything; finished parts in it are kept.
        vae_steps: updates of the autoencoder.
        teacher_steps: updates of the teacher.
        clip_steps: updates of a CLIP that measures.
        steps: of the distillation, other than the configuration's.
        sampler_steps: per image.
        times: number of drawings of each digit.
        count: digits to learn from; None: all 1,797.

    Returns:
        The printed figures.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images, captions = draw_digits()
    images, captions = images[:count], captions[:count]
    if not (out / "images").is_dir():
        write_images(out / "images", images, captions)
    teacher = out / "teacher"
    seconds = make_teacher(teacher, images, captions, vae_steps=vae_steps, steps=teacher_steps)
    values = read_config(str(Path(__file__).with_suffix(".yaml")), None)
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
            "image_size": list(SIZE),
            "sampler_steps": sampler_steps,
            "guidance": GUIDANCE,
            "batch_size": 100,
            "out": str(out / name),
        }
        generate(make(GenerateConfig, options))
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
        "image": str(folders["student"] / "images" / "000007.png"),
        "prompt": prompts(times)[7],
        "scale": 4,
        "strengths": [0.1, 0.1],  # the teacher has seen no larger images
        "guidance": GUIDANCE,
        "out": str(out / "enlarged"),
    }
    enlarged = upscale(make(UpscaleConfig, enlarge))

    clip = make_clip(out / "clip", images, captions, clip_steps)

    def measure(folder: Path) -> dict[str, float]:
        options = {"samples": str(folder / "images"), "captions": str(texts), "metrics": ["clip_fid", "clip_t"], **clip}
        options |= {"reference": str(out / "images"), "prefix": "", "out": str(folder / "evaluation")}
        statistics = str(out / "reference.npz")  # measured once
        options |= {"reference": statistics} if Path(statistics).is_file() else {"save_reference": statistics}
        figures = evaluate(make(EvaluateConfig, options))
        return {name: figures[name] for name in ("clip_fid", "clip_t")}

    reader = Reader()
    data = Pixels(open_captioned(str(out / "images")), config.image_size)
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
    write_json(out / "results.json", results)
    _print(results, out, enlarged)
    return results


def _print(results: dict[str, Any], out: Path, enlarged: dict[str, Any]) -> None:
    for name, share in results["digit_accuracy"].items():
        print(f"digits read as their prompts, {name}: {100 * share:.1f}%")
    for name, figures in results["clip"].items():
        print(f"by a CLIP of these images, {name}: FID {figures['clip_fid']:.3f}, CLIP-T {figures['clip_t']:.3f}")
    errors = results["noise_error"]
    share = errors["student"] / errors["untrained"]
    print(f"error against the teacher's noise: {errors['student']:.5f}, {share:.2f} of the untrained mixers'")
    print("see:", out / "sheet.png", enlarged["image"], sep="\n  ")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo-t2i-output", help="folder for everything (default: %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=300, help="of the autoencoder (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=1200, help="of the teacher (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the distillation, other than the configuration's")
    arguments = parser.parse_args(argv)
    run(arguments.out, vae_steps=arguments.vae_steps, teacher_steps=arguments.teacher_steps, steps=arguments.steps)


if __name__ == "__main__":
    main()
