"""diffusers' own model tests, of its repository, aimed at our denoiser: `nox -s peers`.

The root of a diffusers repository must be importable; its tests are the package `tests` there. Classes of tests that
need an accelerator are among them; they skip themselves where there is none.
"""

import pytest
import torch
from tests.models.testing_utils import (
    BaseModelTesterConfig,
    LayerwiseCastingTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TorchCompileTesterMixin,
    TrainingTesterMixin,
)
from tests.testing_utils import enable_full_determinism, torch_device

from gspn_dit import GSPNDiTTransformer2DModel

enable_full_determinism()


class _Config(BaseModelTesterConfig):
    main_input_name = "hidden_states"
    input_shape = (4, 8, 8)
    output_shape = (8, 8, 8)
    model_class = GSPNDiTTransformer2DModel

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def get_init_dict(self) -> dict:
        return {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_classes": 5, "proxy_channels": self.proxy}

    def get_dummy_inputs(self, batch_size: int = 4) -> dict[str, torch.Tensor]:
        return {
            "hidden_states": torch.randn(batch_size, *self.input_shape, generator=self.generator).to(torch_device),
            "timestep": torch.randint(1000, (batch_size,), generator=self.generator).to(torch_device),
            "class_labels": torch.randint(5, (batch_size,), generator=self.generator).to(torch_device),
        }


class _GSPN(_Config):
    proxy = None


class _GSPN2(_Config):
    proxy = 4


class _Compile(TorchCompileTesterMixin):
    """Compiled on the CPU too, where diffusers skips these tests; what offloads needs an accelerator all the same."""

    different_shapes_for_compilation = ((8, 8), (16, 12))

    @pytest.mark.skipif(torch_device == "cpu", reason="needs an accelerator")
    def test_compile_with_group_offloading(self):
        super().test_compile_with_group_offloading()

    def get_dummy_inputs(self, batch_size: int = 4, height: int = 8, width: int = 8) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = super().get_dummy_inputs(batch_size)
        shape = (batch_size, 4, height, width)
        return inputs | {"hidden_states": torch.randn(shape, generator=self.generator).to(torch_device)}


# Marks of a class are inherited, and with them the one that skips all where there is no accelerator.
TorchCompileTesterMixin.pytestmark = []


class _Training(TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"GSPNDiTTransformer2DModel"})


def _tests() -> dict[str, type]:
    """Return a class of tests for every kind of them and both mixers."""
    kinds = (ModelTesterMixin, MemoryTesterMixin, LayerwiseCastingTesterMixin, _Compile, _Training)
    return {
        f"Test{mixer.__name__.strip('_')}{kind.__name__.strip('_').replace('TesterMixin', '')}": type(
            "Test", (kind, mixer), {}
        )
        for mixer in (_GSPN, _GSPN2)
        for kind in kinds
    }


globals().update(_tests())
