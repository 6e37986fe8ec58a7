"""Exported files: outputs equal to the model's, shapes, and what is said of bad input."""

import re
import sys

import pytest
import timm
import torch
from vision_cases import TINY, tiny_run

import gspn_vision.export
from gspn_core import SpatialPropagation
from gspn_core.runs.options import make
from gspn_vision import cli
from gspn_vision.config import TrainConfig
from gspn_vision.export import ExportMismatchError, as_text, export, open_model
from gspn_vision.models.blocks import ExportablePropagation
from gspn_vision.train import train

MODELS = ("gspn_nano", "gspn2_nano")


@pytest.fixture
def onnxruntime():
    """ONNX and what runs it; the exporter itself is needed, too."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"ONNX export needs {name}")
    return pytest.importorskip("onnxruntime", reason="runs what was exported")


def tiny(name="gspn2_nano", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=3, **TINY, **kwargs).eval()


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(ours, model, x):
    with torch.no_grad():
        expected = model(x)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name,size", [(MODELS[0], (64, 64)), (MODELS[1], (64, 64)), (MODELS[1], (40, 72))])
def test_onnx(name, size, onnxruntime, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    path = tmp_path / "model.onnx"
    exported = export(model, path, input_size=(3, *size))
    assert (exported.images, exported.logits) == (("batch", 3, *size), ("batch", 1000))
    assert exported.bytes == path.stat().st_size
    assert exported.difference < 1e-5 * exported.largest
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    for n in (1, 2, 5):
        x = images(n, 3, *size)
        assert_equal(torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), model, x)
    assert __file__.rpartition("/")[0].encode() not in path.read_bytes()
    assert b"/site-packages/" not in path.read_bytes()


def test_onnx_of_any_size(onnxruntime, tmp_path):
    model = tiny("gspn_nano", in_chans=1)
    exported = export(model, tmp_path / "model.onnx", input_size=(1, 48, 64), dynamic_size=True)
    assert (exported.images, exported.logits) == (("batch", 1, "height", "width"), ("batch", 3))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 1, 33, 80), (3, 1, 32, 32), (2, 1, 16, 300), (1, 1, 5, 7)):
        x = images(*shape)
        assert_equal(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model, x)


def test_onnx_of_any_size_where_the_last_map_is_a_pixel(onnxruntime, tmp_path, monkeypatch):
    """The exporter treats sizes of 1 as constants; so the model is traced with larger images."""
    model, path = timm.create_model("gspn2_nano", num_classes=3).eval(), tmp_path / "new" / "model.onnx"
    export(model, path, input_size=(3, 32, 32), dynamic_size=True)  # makes the folder
    session = onnxruntime.InferenceSession(path)
    for shape in ((2, 3, 32, 32), (1, 3, 48, 48), (2, 3, 64, 96)):
        x = images(*shape)
        assert_equal(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model, x)

    def fail(*_):
        raise Exception("Reshape\nmore")

    monkeypatch.setattr("gspn_vision.export._onnx", lambda *_: fail)
    with pytest.raises(ExportMismatchError, match=r"^the file does not run on images \(2, 3, 64, 64\): Reshape$"):
        export(model, path, input_size=(3, 32, 32), dynamic_size=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_timms_own_export(onnxruntime, tmp_path):
    """timm's onnx_export.py makes the model with exportable=True, and knows no operators but torch's."""
    from timm.utils.onnx import onnx_export, onnx_forward

    model = tiny(exportable=True)
    onnx_export(model, str(tmp_path / "model.onnx"), batch_size=2, input_size=(3, 10, 16))
    x = images(3, 3, 10, 16)
    assert_equal(torch.from_numpy(onnx_forward(str(tmp_path / "model.onnx"), x)), model, x)
    with timm.layers.set_exportable(True):
        assert type(tiny().stages[0].blocks[0].mixer.propagation) is ExportablePropagation
    assert type(tiny().stages[0].blocks[0].mixer.propagation) is SpatialPropagation


def test_torch(tmp_path):
    model = tiny()
    path = tmp_path / "model.pt2"
    exported = export(model, path, input_size=(3, 48, 64), format="torch", dynamic_size=True)
    assert (exported.images, exported.difference) == (("batch", 3, "height", "width"), 0)
    program = torch.export.load(path).module()
    # Also of sizes whose scans would save more states for a backward pass than those of the size traced with.
    for shape in ((1, 3, 48, 64), (3, 3, 50, 33), (1, 3, 40, 600)):
        assert torch.equal(program(images(*shape)), model(images(*shape)))


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_fixed_batch(format, onnxruntime, tmp_path):
    path = tmp_path / f"model{gspn_vision.export.SUFFIXES[format]}"
    path.write_bytes(b"older")
    exported = export(tiny(), path, input_size=(3, 32, 48), format=format, batch=1)
    assert (exported.images, exported.logits) == ((1, 3, 32, 48), (1, 3))
    if format == "onnx":
        assert onnxruntime.InferenceSession(path).get_inputs()[0].shape == [1, 3, 32, 48]
    else:
        torch.export.load(path)


@pytest.mark.parametrize("wrong", [lambda y: y + 1e-3, lambda y: y * float("nan"), lambda y: y[:, :2]])
def test_a_wrong_file_does_not_appear(wrong, tmp_path, monkeypatch):
    def write(*arguments):
        run = written(*arguments)
        return lambda x: wrong(run(x))

    written = gspn_vision.export._torch
    monkeypatch.setattr(gspn_vision.export, "_torch", write)
    (tmp_path / "model.pt2").write_bytes(b"older")
    with pytest.raises(ExportMismatchError, match=r"the file's outputs differ|the file gives \(2, 2\)"):
        export(tiny(), tmp_path / "model.pt2", input_size=(3, 32, 32), format="torch")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"older"


def test_the_command(training_folder, onnxruntime, tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "model.onnx"
    train(make(TrainConfig, tiny_run(training_folder) | {"epochs": 1, "warmup_epochs": 0, "out": str(run)}))
    capsys.readouterr()
    code, out, _ = call(capsys, "export", "--checkpoint", run, "--which", "latest", "--out", output)
    assert code == 0
    expected = [
        re.escape(str(output)) + r": \d\.\d MB",
        r"input   images \(batch, 3, 32, 32\) float32",
        r"output  logits \(batch, 3\) float32",
        r"checked: outputs up to \d\S* differ from the model's by \d\S*",
    ]
    assert re.fullmatch("\n".join(expected) + "\n", out)
    model, size = open_model(None, str(run), which="latest")
    assert size == (3, 32, 32)
    x = images(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(output)
    assert_equal(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model, x)


def test_the_command_with_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(
        capsys, "export", "--model", "gspn_nano", "--format", "torch", "--image-size", "32x64", "--batch-size", 2
    )
    assert code == 0
    assert out.startswith("model.pt2: ")
    assert "input   images (2, 3, 32, 64) float32\noutput  logits (2, 1000) float32\n" in out
    assert (tmp_path / "model.pt2").is_file()


def test_without_onnxruntime(onnxruntime, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    exported = export(tiny(), tmp_path / "model.onnx", input_size=(3, 32, 32))
    assert exported.difference is None and exported.largest is None
    assert "not checked: pip install onnxruntime" in as_text(vars(exported))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_exporter(missing, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name == "gspn_core.export" or name.split(".")[0] == "onnxscript"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = call(capsys, "export", "--model", "gspn_nano", "--image-size", 32, "--out", tmp_path / "model.onnx")
    assert code == 2
    assert err.startswith("gspn-vision: error: ONNX export needs onnx and onnxscript: pip install onnx onnxscript")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "folder.onnx").mkdir()
    nano = ["--model", "gspn_nano"]
    deit = ["--model", "deit_tiny_patch16_224", "--out", tmp_path / "m.onnx", "--image-size", "100"]
    cases = {
        "give either model or checkpoint, got neither": [],
        "give either model or checkpoint, got both": [*nano, "--checkpoint", "runs"],
        "got 'gspn_nanoo'; perhaps one of ": ["--model", "gspn_nanoo"],
        "no checkpoint in 'absent'": ["--checkpoint", "absent"],
        f"'{tmp_path}/folder.onnx' is a folder": [*nano, "--out", tmp_path / "folder.onnx"],
        "the file of the format torch must end in .pt2, got 'm.onnx'": [*nano, "--format", "torch", "--out", "m.onnx"],
        "image_size: expected a side in pixels or HEIGHTxWIDTH": [*nano, "--image-size", "0x32"],
        "batch_size must be an integer from 1, got 0": [*nano, "--batch-size", "0"],
        "image_size must be a multiple of the patches of 16x16, got 100x100": deit,
    }
    for message, arguments in cases.items():
        code, out, err = call(capsys, "export", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("gspn-vision: error: ")
        assert message in err
        assert err.count("\n") == 1
