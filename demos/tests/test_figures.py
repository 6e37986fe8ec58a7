import figures
import torch
from PIL import Image


def test_figures(tmp_path):
    (tmp_path / "train.csv").write_text("step,loss\n4,2.0\n8,1.5\n")
    (tmp_path / "validation.csv").write_text("step,loss,top1\n8,1.4,50.0\n")
    figures.training_curve(tmp_path, tmp_path / "curve.png", "run")
    figures.confusion_matrix(torch.eye(3).long() * 4, ["a", "b", "long name"], tmp_path / "matrix.png", "matrix")
    image = Image.new("L", (8, 8))
    figures.gallery([image] * 3, ["1", "2", "3"], ["1", "2", "4"], [0.9] * 3, tmp_path / "gallery.png", "digits")
    for name in ("curve", "matrix", "gallery"):
        with Image.open(tmp_path / f"{name}.png") as figure:
            assert min(figure.size) > 150
