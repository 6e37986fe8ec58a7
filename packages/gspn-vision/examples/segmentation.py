"""Dense prediction: a segmentation head on a GSPN backbone's maps, at a photograph's own size.

    python packages/gspn-vision/examples/segmentation.py --out segmentation.png

The photographs are the two that scikit-learn carries, 427 x 640. Their labels come from a classical method: k-means of
the blurred colours, the same clusters for both. The left three quarters train the network, the right quarter is held
out; the network then labels the whole photograph. It is a demonstration of features at four strides, of images that are
neither square nor 224 pixels wide, and of nothing else: colours are no objects.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib import colormaps
from PIL import Image, ImageFilter
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import gspn_vision  # noqa: F401  (registers the models)

CLASSES = 6


class Segmenter(nn.Module):
    """A backbone and the lightest of pyramid heads: images (N, 3, H, W) to logits (N, classes, H, W)."""

    def __init__(self, backbone: str, classes: int, width: int = 64) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True)
        self.lateral = nn.ModuleList([nn.Conv2d(c, width, 1) for c in self.backbone.feature_info.channels()])
        self.head = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Sum the four maps at the finest stride, classify there, and enlarge."""
        maps = [lateral(m) for lateral, m in zip(self.lateral, self.backbone(x), strict=True)]
        finest = maps[0]
        for coarse in maps[1:]:
            finest = finest + F.interpolate(coarse, finest.shape[-2:], mode="bilinear")
        return F.interpolate(self.head(finest), x.shape[-2:], mode="bilinear")


def photographs() -> tuple[Tensor, Tensor]:
    """Return images (2, 3, 427, 640) in [-1, 1] and labels (2, 427, 640), clusters from dark to bright."""
    images = [Image.fromarray(image) for image in load_sample_images().images]
    blurred = np.stack([np.asarray(image.filter(ImageFilter.GaussianBlur(4))) for image in images]) / 255
    sample = blurred.reshape(-1, 3)[:: blurred.size // 3 // 5000]
    clusters = KMeans(CLASSES, n_init=4, random_state=0).fit(sample)
    order = clusters.cluster_centers_.sum(1).argsort().argsort()
    labels = order[clusters.predict(blurred.reshape(-1, 3))].reshape(blurred.shape[:-1])
    pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1, torch.from_numpy(labels.astype(np.int64))


def scores(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return pixel accuracy and mean intersection over union, in percent, over the classes that occur."""
    ious = []
    for c in range(CLASSES):
        union = ((predicted == c) | (labels == c)).sum()
        if union > 0:
            ious.append(((predicted == c) & (labels == c)).sum() / union)
    return 100 * float((predicted == labels).float().mean()), 100 * float(torch.stack(ious).mean())


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train, print the scores of the held-out quarter, and write a picture; return the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gspn2_nano", help="timm backbone (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="updates (default: %(default)s)")
    parser.add_argument("--crop", type=int, nargs=2, default=(256, 320), help="height and width trained on")
    parser.add_argument("--out", type=Path, default=Path("segmentation.png"), help="picture (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    images, labels = photographs()
    height, width = labels.shape[1:]
    border = width * 3 // 4
    rows, columns = arguments.crop
    if not 32 <= rows <= height or not 32 <= columns <= border:
        parser.error(f"--crop must be from 32 32 to {height} {border}, got {rows} {columns}")
    model = Segmenter(arguments.model, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=arguments.steps)
    with trange(arguments.steps, unit="update") as bar:
        for _ in bar:
            top = int(torch.randint(height - rows + 1, ()))
            left = int(torch.randint(border - columns + 1, ()))
            x = images[:, :, top : top + rows, left : left + columns]
            y = labels[:, top : top + rows, left : left + columns]
            if torch.rand(()) < 0.5:
                x, y = x.flip(-1), y.flip(-1)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.eval()
    with torch.inference_mode():
        predicted = model(images).argmax(1)
    accuracy, iou = scores(predicted[..., border:], labels[..., border:])
    print(f"held-out quarter of 2 photographs, {height}x{width}: pixel accuracy {accuracy:.1f}%, mean IoU {iou:.1f}%")

    palette = (np.asarray(colormaps["viridis"](np.linspace(0, 1, CLASSES)))[:, :3] * 255).astype(np.uint8)
    pictures = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    sheet = [
        np.concatenate([p, palette[t], palette[q]], 1) for p, t, q in zip(pictures, labels, predicted, strict=True)
    ]
    Image.fromarray(np.concatenate(sheet)).save(arguments.out)
    print(f"{arguments.out}: photograph, labels, prediction")
    return accuracy, iou


if __name__ == "__main__":
    main()
