import pytest
from PIL import Image
from vision_digits import main, run


def test_the_demo_learns_and_draws(tmp_path, capsys):
    files = run(tmp_path, epochs=3)
    out = capsys.readouterr().out
    assert out.startswith("gspn2_nano, ")
    recognised = float(out.split(" s: ")[1].split("%")[0])
    assert recognised > 85  # after 3 of 15 epochs; chance is 10
    assert out.count("(is ") == 5
    assert [file.name for file in files] == [
        *("curve.png", "confusion.png", "digits.png"),
        *("propagation_flower.png", "propagation_china.png"),
    ]
    for file in files:
        with Image.open(file) as figure:
            assert figure.format == "PNG"
            assert figure.width > 800


def test_its_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--config", "--epochs"))
