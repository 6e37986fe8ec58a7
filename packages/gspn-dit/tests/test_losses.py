"""The losses against an independent implementation and against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from plain import plain_noise_loss

from gspn_dit.losses import FlowLoss, NoiseLoss, discretised_gaussian_log_likelihood, make_loss


def case(n=6, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, channels, 4, 6, generator=generator) * 2 - 1
    x0[:, :, 0] = 1.0
    x0[:, :, 1] = -1.0
    noise = torch.randn(x0.shape, generator=generator)
    output = torch.cat((noise + 0.3 * torch.randn(x0.shape, generator=generator), torch.randn(x0.shape)), dim=1)
    return x0, noise, output


@pytest.mark.parametrize("times", [[0, 1, 2, 37, 500, 999], [0] * 6])
def test_noise_loss_and_its_gradient(times):
    x0, noise, output = case()
    t = torch.tensor(times)
    output.requires_grad_()
    ours = NoiseLoss()(output, x0, noise, t)
    expected = plain_noise_loss(output.double(), x0.double(), noise.double(), t)
    torch.testing.assert_close(ours["loss"].double(), expected, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(ours["loss"], ours["mse"] + ours["vlb"])
    (ours_gradient,) = torch.autograd.grad(ours["loss"].sum(), output)
    (gradient,) = torch.autograd.grad(expected.sum(), output)
    assert (ours_gradient - gradient).abs().max() < 1e-3 * gradient.abs().max()


def test_the_bound_does_not_train_the_noise():
    x0, noise, output = case()
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(NoiseLoss()(output, x0, noise, torch.full((6,), 300))["vlb"].sum(), output)
    assert gradient[:, :2].abs().max() == 0
    assert gradient[:, 2:].abs().min() > 0


def test_tables_are_those_of_diffusers():
    loss = NoiseLoss()
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="fixed_small")
    x0, noise, _ = case()
    t = torch.tensor([0, 1, 5, 100, 700, 999])
    torch.testing.assert_close(loss.corrupt(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    for step in (1, 5, 999):
        assert loss.log_posterior[step].exp().item() == pytest.approx(scheduler._get_variance(step).item(), rel=1e-3)
    assert loss.log_posterior[0] == loss.log_posterior[1]


def test_likelihoods_of_all_levels_add_up_to_one():
    levels = torch.arange(256).double() / 127.5 - 1
    for mean, scale in ((0.1, 0.05), (-1.2, 0.3), (0.99, 0.002)):
        log_scale = torch.tensor(scale).double().log()
        p = discretised_gaussian_log_likelihood(levels, torch.tensor(mean).double(), log_scale).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-6)


def test_times_of_noise():
    t = NoiseLoss().draw_times(20000, torch.Generator().manual_seed(0))
    assert (t.min().item(), t.max().item()) == (0, 999)
    assert t.float().mean().item() == pytest.approx(499.5, abs=10)


def test_flow_loss():
    loss = FlowLoss()
    x0, noise, output = case()
    t = loss.draw_times(6, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() < 1
    velocity = output[:, :2]
    expected = torch.stack([(v - (e - x)).square().mean() for v, e, x in zip(velocity, noise, x0, strict=True)])
    torch.testing.assert_close(loss(velocity, x0, noise, t)["loss"], expected)
    scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(
        loss.corrupt(x0, noise, torch.full((6,), 0.25)),
        scheduler.scale_noise(x0, scheduler.timesteps[[750]].expand(6), noise),
    )
    assert loss.timestep(torch.tensor([0.25])).item() == scheduler.timesteps[750].item() == 250


def test_times_of_flow():
    times = FlowLoss().draw_times(20000, torch.Generator().manual_seed(0))
    assert times.mean().item() == pytest.approx(0.5, abs=0.01)
    assert times.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.02)


@pytest.mark.parametrize("objective,channels", [("noise", 4), ("flow", 2)])
def test_wrong_channels(objective, channels):
    x0, noise, output = case()
    wrong = output[:, : 2 if objective == "noise" else 4]
    with pytest.raises(ValueError, match=f"must have {channels} output channels, got {wrong.shape[1]}"):
        make_loss(objective)(wrong, x0, noise, torch.zeros(6, dtype=torch.long))
