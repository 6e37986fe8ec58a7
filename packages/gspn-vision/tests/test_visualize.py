import pytest
import timm
import torch
from matplotlib.image import imread
from PIL import Image
from vision_cases import TINY

from gspn_core import DIRECTIONS
from gspn_vision import visualize
from gspn_vision.data import Preprocessing

PREP = Preprocessing(
    in_chans=3, size=(64, 64), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=0.9
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("gspn2_nano", **{**TINY, "stem_stride": 4}).eval()


@pytest.fixture
def photograph() -> Image.Image:
    return Image.effect_noise((160, 96), 80).convert("RGB")


def test_maps_are_what_the_recurrence_says(model, photograph):
    """Written out for one direction: weights of rows, each line from the one above, from the model's own logits."""
    layer = "stages.2.blocks.0.mixer.propagation"
    result = visualize.heat_maps(model, PREP, photograph, pixel=(40, 80), layer=layer)
    assert result.maps.shape == (4, 6, 10)  # stride 16
    assert result.position == (2, 5)
    seen = []
    module = model.get_submodule(layer)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    full = Preprocessing(**{**vars(PREP), "size": (96, 160), "crop_pct": 1.0})
    with torch.no_grad():
        model(full.transform()(photograph)[None])
        logits = module.project(seen[0])[1][0, DIRECTIONS.index("top_to_bottom"), 0]  # (3, 6, 10)
    gates = logits.sigmoid()
    gates[0, :, 0] = 0
    gates[2, :, -1] = 0
    weights = gates / gates.sum(0)
    expected = torch.zeros(6, 10)
    expected[2, 5] = 1
    for row in range(3, 6):
        above = torch.nn.functional.pad(expected[row - 1], (1, 1))
        expected[row] = sum(weights[k, row] * above[k : k + 10] for k in range(3))
    torch.testing.assert_close(result.maps[DIRECTIONS.index("top_to_bottom")], expected)


def test_each_direction_fills_its_side(model, photograph):
    result = visualize.heat_maps(model, PREP, photograph, pixel=(50, 100))
    row, column = result.position
    maps = dict(zip(DIRECTIONS, result.maps, strict=True))
    assert all(m[row, column] == 1 for m in maps.values())
    assert maps["left_to_right"][:, :column].abs().max() == 0
    assert maps["left_to_right"][row, column + 1 :].min() > 0
    assert maps["right_to_left"][:, column + 1 :].abs().max() == 0
    assert maps["top_to_bottom"][:row].abs().max() == 0
    assert maps["bottom_to_top"][row + 1 :].abs().max() == 0


def test_chunks_stop_the_spread(model, photograph):
    result = visualize.heat_maps(model, PREP, photograph, pixel=(50, 81), layer="stages.0.blocks.0.mixer.propagation")
    assert result.chunk_size == 2
    assert all(int((m.sum(0) > 0).sum()) <= 3 and int((m.sum(1) > 0).sum()) <= 3 for m in result.maps)


def test_sizes(model, photograph):
    result = visualize.heat_maps(model, PREP, photograph, pixel=(95, 159), size=(64, 200))
    assert result.photograph.size == (200, 64)
    assert result.pixel == (63, 198)
    assert result.maps.shape == (4, 4, 13)
    assert visualize.heat_maps(model, PREP, photograph.resize((8, 8))).maps.shape == (4, 1, 1)
    large = visualize.heat_maps(model, PREP, photograph.resize((2400, 96)), pixel=(95, 2399))
    assert (large.photograph.size, large.pixel) == ((1024, 41), (40, 1023))
    with pytest.raises(ValueError, match="has no propagation layer"):
        visualize.heat_maps(timm.create_model("test_convnext"), PREP, photograph)


@pytest.mark.parametrize("size", [(96, 160), (160, 64)])
def test_the_drawing_is_an_image_of_several_colours(model, photograph, tmp_path, size):
    result = visualize.heat_maps(model, PREP, photograph, size=size)
    visualize.draw(result, tmp_path / "maps.png", title="a title")
    pixels = imread(tmp_path / "maps.png")
    assert pixels.shape[2] == 4
    assert len({tuple(p) for p in (pixels[::7, ::7].reshape(-1, 4) * 255).astype(int).tolist()}) > 100


def test_a_page_of_all_layers(model, photograph, tmp_path):
    names = list(visualize.layers(model))
    results = [visualize.heat_maps(model, PREP, photograph, pixel=(50, 100), layer=name) for name in names]
    assert len(results) == 4
    visualize.draw_page(results, tmp_path / "page.png", title="all")
    picture = imread(tmp_path / "page.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > picture.shape[0]
    assert picture[..., :3].std() > 0.05
    visualize.draw_page(results[:1], tmp_path / "one.png")


def test_the_mark_is_where_the_map_is_hottest(model, photograph):
    """Drawn over the photograph, a position of a coarse map is centred where its middle is."""
    result = visualize.heat_maps(model, PREP, photograph, pixel=(40, 80), layer="stages.2.blocks.0.mixer.propagation")
    assert result.maps.shape[-2:] == (6, 10) and result.position == (2, 5)
    assert visualize.center_of(result) == (2.5 * 96 / 6, 5.5 * 160 / 10)
