"""Averages whose length is chosen after training."""

import numpy as np
import pytest
import torch
from dit_cases import tiny_run
from safetensors.torch import load_file

from gspn_core.runs.options import make
from gspn_dit import GSPNDiTTransformer2DModel
from gspn_dit.averages import LENGTHS, Profile, average, combine, exponent, find_snapshots, power_average
from gspn_dit.checkpoint import load_model
from gspn_dit.config import AverageConfig, SampleConfig, TrainConfig
from gspn_dit.sample import sample
from gspn_dit.train import train


def test_lengths():
    """The deviation of the profile s^g, relative to t; g is 6.94 at 0.1 and 16.97 at 0.05, as published."""
    assert (round(exponent(0.10), 2), round(exponent(0.05), 2)) == (6.94, 16.97)
    for length in (0.02, 0.1, 0.25):
        s = (np.arange(100_000) + 0.5) / 100_000
        profile = s ** exponent(length)
        mean = (s * profile).sum() / profile.sum()
        assert np.sqrt(((s - mean) ** 2 * profile).sum() / profile.sum()) == pytest.approx(length, rel=1e-3)
    for length in (0.0, 0.28):
        with pytest.raises(ValueError, match=r"length must be above 0 and below 0\.28"):
            exponent(length)


@pytest.mark.parametrize("length", [0.04, 0.07, 0.13, 0.2])
def test_an_average_is_that_of_its_length(length):
    """A sum of snapshots of two averages equals the average that was kept all along."""
    torch.manual_seed(0)
    weights = torch.nn.Linear(8, 1, bias=False).double()
    kept, wanted = [power_average(weights, kind) for kind in LENGTHS], power_average(weights, length)
    profiles, snapshots, steps = [], [], 2000
    for step in range(1, steps + 1):
        with torch.no_grad():  # it converges, and swings
            weights.weight.copy_(torch.linspace(1, 2, 8) / (1 + step / 200) + torch.sin(torch.arange(8) + step / 300))
        for mean in (*kept, wanted):
            mean.update_parameters(weights)
        if step % 100 == 0:
            profiles += [Profile(step, exponent(kind)) for kind in LENGTHS]
            snapshots += [mean.module.weight.clone() for mean in kept]
    factors = combine(profiles, Profile(steps, exponent(length)))
    assert factors.sum() == pytest.approx(1)
    found = sum(factor * snapshot for factor, snapshot in zip(factors, snapshots, strict=True))
    torch.testing.assert_close(found, wanted.module.weight, rtol=0, atol=5e-3)
    assert not torch.allclose(weights.weight, wanted.module.weight, rtol=0, atol=5e-2)


def test_of_a_run(tmp_path):
    """Snapshots do not depend on interruptions, and the average is a model that `sample` knows everything of."""
    options = {"average_every": 2, "sample_every": None}
    train(make(TrainConfig, tiny_run(str(tmp_path / "whole"), **options)))
    for steps in (3, 6):
        options |= {"steps": steps, "lr_schedule": "constant"}
        train(make(TrainConfig, tiny_run(str(tmp_path / "parts"), **options)))
    train(make(TrainConfig, tiny_run(str(tmp_path / "once"), **options)))
    snapshots = find_snapshots(tmp_path / "whole")
    assert [profile.step for profile in snapshots.values()] == [2, 2, 4, 4, 6, 6]
    last = sorted((tmp_path / "once" / "averages").iterdir())[-1]
    ours, theirs = load_file(last), load_file(tmp_path / "parts" / "averages" / last.name)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(
        ValueError, match=r"average_every must be a number to continue .*, got None: its averages are of"
    ):
        train(make(TrainConfig, tiny_run(str(tmp_path / "parts"), **options | {"average_every": None, "steps": 7})))
    train(make(TrainConfig, tiny_run(str(tmp_path / "parts"), **options | {"average_every": 1, "steps": 7})))
    assert "step-00000007-average-0.05.safetensors" in {file.name for file in find_snapshots(tmp_path / "parts")}

    run, out = str(tmp_path / "whole"), tmp_path / "model"
    values = {"checkpoint": run, "out": str(out), "length": 0.08, "progress": False}
    assert average(make(AverageConfig, values)) == {"folder": str(out), "step": 6, "length": 0.08, "snapshots": 6}
    average(make(AverageConfig, values | {"length": 0.05}))  # replaces it
    weights = GSPNDiTTransformer2DModel.from_pretrained(out).state_dict()
    kept = load_file(tmp_path / "whole" / "averages" / "step-00000006-average-0.05.safetensors")
    assert all(torch.allclose(weights[name], kept[name], rtol=0, atol=1e-5) for name in kept)
    assert load_model(out)[1]["class_names"] == load_model(run)[1]["class_names"]
    drawn = {"checkpoint": str(out), "out": str(tmp_path / "drawn"), "count": 2, "sampler_steps": 2, "progress": False}
    assert sample(make(SampleConfig, drawn))["drawn"] == 2

    for changes, error, message in (
        ({"length": 0.3}, ValueError, r"length must be above 0 and below 0\.28, got 0\.3"),
        ({"step": 7}, ValueError, "step must be at most 6, that of the last snapshot, got 7"),
        ({"step": 1}, ValueError, "step must be at least 2, got 1"),
        ({"checkpoint": "absent"}, FileNotFoundError, "no checkpoint in 'absent'"),
        ({"checkpoint": str(out)}, FileNotFoundError, "no averages in .*; train with average_every"),
        ({"out": run}, ValueError, "out must be a new folder or that of a model"),
        ({"out": __file__}, ValueError, "out must be a new folder or that of a model"),
        ({"out": str(tmp_path)}, ValueError, "out must be a new folder or that of a model"),
    ):
        with pytest.raises(error, match=message):
            average(make(AverageConfig, values | changes))
