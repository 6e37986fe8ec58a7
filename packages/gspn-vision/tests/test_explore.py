"""`gspn-vision explore`: what the page shows, and the page itself in a browser, where gradio and one are installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from vision_cases import TINY

from gspn_vision.checkpoint import Loaded, write_model
from gspn_vision.cli import main
from gspn_vision.explore import Explorer, page, sample_photograph
from gspn_vision.foundation.vision import converted, from_name
from gspn_vision.visualize import heat_maps

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "img_size": 32, "patch_size": 4}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def model(kind: str) -> Loaded:
    torch.manual_seed(0)
    if kind == "gspn2_nano":
        return from_name(kind, {**TINY, "num_classes": 7})
    return converted(from_name("vit_tiny_patch16_224", VIT), [], {})


@pytest.fixture(params=["gspn2_nano", "converted"])
def explorer(request: pytest.FixtureRequest, tmp_path: Path) -> Explorer:
    vision = model(request.param)
    about = {"title": request.param, "folder": tmp_path}
    return Explorer(vision.model.eval(), vision.preprocessing, vision.class_names, **about)


def test_figures_and_predictions(explorer: Explorer, tmp_path: Path) -> None:
    photograph = sample_photograph().resize((96, 64))
    files = [explorer.draw(photograph, pixel, layer) for pixel, layer in [(None, 0), ((10, 80), 0), ((10, 80), 1)]]
    assert len({Path(file).read_bytes() for file in files}) == len(set(files)) == 3
    for file in files:
        with Image.open(file) as figure:
            assert figure.format == "PNG" and Path(file).parent == tmp_path
    guesses = explorer.predict(photograph)
    assert list(guesses) == sorted(guesses, key=lambda name: -guesses[name])
    assert len(guesses) == min(5, len(explorer.class_names)) and set(guesses) <= set(explorer.class_names)
    assert 0 < sum(guesses.values()) <= 1.0001


def test_a_figure_is_of_the_pixel_that_was_clicked(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("gspn_vision.explore.draw", lambda result, *_, **__: seen.append(result))
    photograph = sample_photograph().resize((96, 64))
    explorer.draw(photograph, (60, 90), 1)
    layer = explorer.layers[1]
    expected = heat_maps(explorer.model, explorer.preprocessing, photograph, pixel=(60, 90), layer=layer)
    assert torch.equal(seen[0].maps, expected.maps) and seen[0].layer == layer
    h, w = seen[0].maps.shape[-2:]
    assert seen[0].position == (60 * h // 64, 90 * w // 96)


def test_a_model_without_propagation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "--model", "test_resnet", "--port", str(free_port())]) == 2
    assert "no propagation layer" in capsys.readouterr().err


def test_a_taken_port_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["explore", "--model", "gspn2_nano", "--port", str(taken.getsockname()[1])]) == 2
    assert "port must be a free one" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'gspn-vision\[explore\]'"):
        page(explorer, sample_photograph())


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


@pytest.fixture(params=["gspn2_nano", "converted"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of the page of a model, served by the command."""
    pytest.importorskip("gradio", reason="needs gradio")
    pytest.importorskip("playwright", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    vision, port = model(request.param), free_port()
    write_model(tmp_path / "model", vision.config(), vision.model.state_dict())
    words = [sys.executable, "-m", "gspn_vision.cli", "explore", "--checkpoint", str(tmp_path / "model")]
    words += ["--port", str(port), "--image-size", "64x96"]
    # pytest may ignore Ctrl-C, as in the background; and a child would inherit that.
    restore = None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=restore) as server:
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None, server.stderr and server.stderr.read()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)
            assert server.stderr is not None and "Ctrl-C ends it" in server.stderr.read()
    assert server.returncode == 0


def test_in_a_browser(url: str, tmp_path: Path) -> None:
    """Open, click, and the figure changes; choose another layer; download it. No error, and nothing from elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api")
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as engines:
        browser = engines.chromium.launch(executable_path=CHROMIUM, args=switches)
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        problems: list[str] = []
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on(
            "request", lambda r: None if r.url.startswith((url, "data:", "blob:", "ws:")) else problems.append(r.url)
        )
        tab.goto(url)
        figure = tab.locator("img[src*='figure-']").first
        figure.wait_for(timeout=60_000)

        def changed(before: str | None) -> str | None:
            tab.wait_for_function(
                "before => document.querySelector(\"img[src*='figure-']\").src !== before", arg=before, timeout=60_000
            )
            return figure.get_attribute("src")

        first = figure.get_attribute("src")
        photograph = tab.locator("img").first
        box = photograph.bounding_box()
        assert box is not None
        photograph.click(position={"x": 0.25 * box["width"], "y": 0.4 * box["height"]})
        second = changed(first)
        tab.get_by_text("row 170").or_(tab.get_by_text("row 171")).first.wait_for()  # 0.4 of 427
        number = tab.get_by_role("spinbutton").first
        number.fill("2")
        number.press("Enter")
        tab.mouse.click(5, 5)
        changed(second)
        with tab.expect_download() as download:
            tab.get_by_role("link", name="Download the figure").or_(
                tab.get_by_role("button", name="Download the figure")
            ).first.click()
        download.value.save_as(tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as saved:
            assert saved.width > 800
        assert not problems
        browser.close()
