"""`gspn-vision explore`: a page of this machine alone, on which to click into photographs and see where pixels go."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from gspn_core.runs.errors import reason
from gspn_core.runs.options import ImageSize
from gspn_core.runs.training import device_of

from .config import ExploreConfig
from .data import Preprocessing, convert
from .foundation.vision import open_model
from .predict import open_image
from .visualize import choose_layer, draw, heat_maps, layers

ADDRESS = "127.0.0.1"
TITLE = "Where a pixel's value goes"
HELP = "Drop a photograph on the left, click a pixel in it, and choose a layer."


class Explorer:
    """What the page shows of a model.

    Args:
        model: with propagation layers, in evaluation mode.
        preprocessing, class_names: of the model.
        title: of figures.
        folder: where figures are written.
        size: height and width that photographs are resized to; None as of `visualize.heat_maps`.

    Raises:
        ValueError: the model has no propagation layer.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        class_names: list[str],
        *,
        title: str,
        folder: str | Path,
        size: ImageSize | None = None,
    ) -> None:
        self.model, self.preprocessing, self.class_names = model, preprocessing, class_names
        self.title, self.folder = title, Path(folder)
        self.size = None if size is None else (size.height, size.width)
        self.first = choose_layer(model, None)
        self.layers = list(layers(model))
        self._lock = threading.Lock()  # a forward pass is watched by hooks
        self._drawn = 0

    def draw(self, photograph: Image.Image, pixel: tuple[int, int] | None, layer: int) -> str:
        """Draw what arrives from a pixel (row, column), the centre by default; return the figure's file."""
        with self._lock:
            found = heat_maps(
                self.model, self.preprocessing, photograph, pixel=pixel, layer=self.layers[layer], size=self.size
            )
            # A new name each time, or a browser shows the figure that it has.
            self._drawn += 1
            file = self.folder / f"figure-{self._drawn}.png"
            draw(found, file, title=self.title)
        return str(file)

    @torch.inference_mode()
    def predict(self, photograph: Image.Image, top: int = 5) -> dict[str, float]:
        """Return the likeliest classes and their probabilities."""
        image = convert(photograph, self.preprocessing.mode, "photograph")
        x = self.preprocessing.transform()(image)[None].to(next(self.model.parameters()).device)
        with self._lock:
            shares, places = self.model(x)[0].float().softmax(0).topk(min(top, len(self.class_names)))
        return {self.class_names[place]: share for place, share in zip(places.tolist(), shares.tolist(), strict=True)}


def page(explorer: Explorer, photograph: Image.Image) -> Any:
    """Return the page, a `gradio.Blocks`.

    Raises:
        ImportError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise ImportError("explore needs gradio: pip install 'gspn-vision[explore]'") from None

    def show(image: Image.Image | None, pixel: Any, layer: int) -> Any:
        if image is None:
            return None, None, ""
        file = explorer.draw(image, pixel, int(layer) - 1)
        row, column = pixel or (image.height // 2, image.width // 2)
        return file, file, f"layer `{explorer.layers[int(layer) - 1]}`, row {row}, column {column}"

    def opened(image: Image.Image | None, layer: int) -> Any:
        if image is None:
            return None, None, None, None, ""
        return explorer.predict(image), None, *show(image, None, layer)

    def clicked(image: Image.Image, layer: int, event: Any) -> Any:
        column, row = event.index
        pixel = (min(int(row), image.height - 1), min(int(column), image.width - 1))
        return pixel, *show(image, pixel, layer)

    clicked.__annotations__["event"] = gradio.SelectData  # by which gradio knows what to pass

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {TITLE}\n{explorer.title}. {HELP}")
        pixel = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                image = gradio.Image(photograph, type="pil", label="Photograph", sources=["upload", "clipboard"])
                count, first = len(explorer.layers), explorer.layers.index(explorer.first) + 1
                layer = gradio.Slider(1, max(count, 2), first, step=1, label=f"Layer of {count}", interactive=count > 1)
                classes = gradio.Label(label="Prediction", num_top_classes=5)
            with gradio.Column(scale=2, min_width=480):
                figure = gradio.Image(label="Figure", interactive=False, type="filepath", buttons=["fullscreen"])
                about = gradio.Markdown()
                download = gradio.DownloadButton("Download the figure")
        shown = [figure, download, about]
        blocks.load(opened, [image, layer], [classes, pixel, *shown])
        image.input(opened, [image, layer], [classes, pixel, *shown])
        image.select(clicked, [image, layer], [pixel, *shown])
        layer.change(show, [image, pixel, layer], shown)
    return blocks


def sample_photograph() -> Image.Image:
    """Return a photograph that scikit-learn carries."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(np.asarray(load_sample_image("china.jpg")))


def _check_port(port: int) -> None:
    """Refuse a port that another program has, before a model is loaded."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"port must be a free one of {ADDRESS}, got {port}: {reason(error)}") from None


def run(config: ExploreConfig) -> dict[str, Any]:
    """Serve the page until Ctrl-C.

    Raises:
        ImportError: gradio is not installed.
        ValueError: the port is taken.
        ValueError, FileNotFoundError: the model cannot be had, or has no propagation layer.
    """
    _check_port(config.port)
    vision = open_model(config).resized(config.image_size)
    photograph = sample_photograph() if config.image is None else open_image(config.image)[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)  # gradio's own would keep the photographs
        explorer = Explorer(
            vision.model.eval().to(device_of(config.device)),
            vision.preprocessing,
            vision.class_names,
            title=vision.name,
            folder=folder,
            size=config.image_size,
        )
        blocks = page(explorer, photograph.convert("RGB"))
        import gradio

        options = {"server_name": ADDRESS, "server_port": config.port, "share": False, "allowed_paths": [folder]}
        look = {"theme": gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])}
        _, url, _ = blocks.launch(**options, **look, quiet=True, prevent_thread_lock=True, inbrowser=config.browser)
        print(f"{url} shows {vision.name}; Ctrl-C ends it", file=sys.stderr)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            blocks.close(verbose=False)
    return {"url": url}
