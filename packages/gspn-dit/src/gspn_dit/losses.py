"""What the denoiser is trained for: noise with a learned variance, or the velocity of a straight path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def per_sample(values: Tensor) -> Tensor:
    """Average over all but the batch: (N, ...) to (N,)."""
    return values.flatten(1).mean(1)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) per element, in nats."""
    ratio = (log_var1 - log_var2).exp()
    return 0.5 * (log_var2 - log_var1 + ratio + (mean1 - mean2) ** 2 * (-log_var2).exp() - 1)


def discretised_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around x under N(mean, scale^2), per element, in nats.

    The outermost bins of [-1, 1] reach to infinity.
    """
    centred, inverse = x - mean, (-log_scale).exp()
    upper = torch.special.ndtr((centred + 1 / 255) * inverse)
    lower = torch.special.ndtr((centred - 1 / 255) * inverse)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


class NoiseLoss(nn.Module):
    r"""Predict the noise, and learn the variance by the variational bound.

        x_t   = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
        loss  = mean (eps - eps_hat)^2 + L_t                                  L_t in bits per element, eps_hat detached
        L_t   = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0,  -log p(x_0 | x_1) on 256 levels for t = 0
        log var_t = f log beta_t + (1 - f) log beta~_t,   f = (v + 1) / 2     v: the second half of the model's channels

    Args:
        timesteps: of the linear betas from `beta_start` to `beta_end`.
        vlb_weight: of the second term.

    Sources: improved DDPM, arXiv 2102.09672, equations 15 and 16; DDPM, arXiv 2006.11239.
    """

    learned_variance = True

    def __init__(
        self, *, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, vlb_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.vlb_weight = vlb_weight
        betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        alphas = 1 - betas
        product = alphas.cumprod(0)
        before = torch.cat((torch.ones(1, dtype=torch.float64), product[:-1]))
        posterior = betas * (1 - before) / (1 - product)
        # The posterior has no variance at t = 0; that of t = 1 is used instead.
        posterior[0] = posterior[1]
        tables = {
            "signal": product.sqrt(),
            "noise": (1 - product).sqrt(),
            "mean_x0": betas * before.sqrt() / (1 - product),
            "mean_xt": (1 - before) * alphas.sqrt() / (1 - product),
            "log_beta": betas.log(),
            "log_posterior": posterior.log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def _at(self, name: str, t: Tensor) -> Tensor:
        table: Tensor = getattr(self, name)
        return table[t].view(-1, 1, 1, 1)

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw times, uniform over the steps: (count,) integers on the CPU."""
        return torch.randint(self.timesteps, (count,), generator=generator)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t, (N, C, H, W), at the times t, (N,)."""
        return self._at("signal", t) * x0 + self._at("noise", t) * noise

    def timestep(self, t: Tensor) -> Tensor:
        """Return the model's time input."""
        return t

    def forward(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Compare the model's output (N, 2C, H, W) with the truth.

        Returns:
            `loss`, and its terms `mse` and `vlb`, each (N,), in float32.

        Raises:
            ValueError: the output must have 2C channels.
        """
        if output.shape[1] != 2 * x0.shape[1]:
            raise ValueError(f"the model must have {2 * x0.shape[1]} output channels, got {output.shape[1]}")
        predicted, v = output.float().chunk(2, dim=1)
        mse = per_sample((noise - predicted) ** 2)
        vlb = self.variational_bound(predicted.detach(), v, x0, noise, t)
        return {"loss": mse + self.vlb_weight * vlb, "mse": mse, "vlb": vlb}

    def variational_bound(self, predicted: Tensor, v: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """L_t of the class's docstring, (N,)."""
        xt = self.corrupt(x0, noise, t)
        guess = (xt - self._at("noise", t) * predicted) / self._at("signal", t)
        true_mean = self._at("mean_x0", t) * x0 + self._at("mean_xt", t) * xt
        mean = self._at("mean_x0", t) * guess + self._at("mean_xt", t) * xt
        share = (v + 1) / 2
        log_var = share * self._at("log_beta", t) + (1 - share) * self._at("log_posterior", t)
        kl = gaussian_kl(true_mean, self._at("log_posterior", t), mean, log_var)
        likelihood = discretised_gaussian_log_likelihood(x0, mean, 0.5 * log_var)
        nats = torch.where(t == 0, -per_sample(likelihood), per_sample(kl))
        return nats / math.log(2)


class FlowLoss(nn.Module):
    r"""Predict the velocity of the straight path from data to noise.

        x_s = (1 - s) x_0 + s eps,    loss = mean (eps - x_0 - v_hat)^2,    s in (0, 1), the model's time is 1000 s

    Args:
        timesteps: scale of the model's time.
        times: "uniform", or "logit_normal": s = sigmoid(z), z standard normal.
        shift: of times, s <- shift s / (1 + (shift - 1) s), for more noise at larger images.

    Sources: SiT, arXiv 2401.08740 (linear path, velocity); Stable Diffusion 3, arXiv 2403.03206 (times and shift).
    """

    learned_variance = False

    def __init__(self, *, timesteps: int = 1000, times: str = "uniform", shift: float = 1.0) -> None:
        super().__init__()
        self.timesteps, self.times, self.shift = timesteps, times, shift

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw times s: (count,) float32 on the CPU."""
        if self.times == "logit_normal":
            s = torch.randn(count, generator=generator).sigmoid()
        else:
            s = torch.rand(count, generator=generator)
        return self.shift * s / (1 + (self.shift - 1) * s)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_s, (N, C, H, W), at the times s, (N,)."""
        s = t.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * noise

    def timestep(self, t: Tensor) -> Tensor:
        """Return the model's time input."""
        return t * self.timesteps

    def forward(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Compare the model's output (N, C, H, W) with the velocity; returns `loss`, (N,).

        Raises:
            ValueError: the output must have C channels.
        """
        if output.shape[1] != x0.shape[1]:
            raise ValueError(f"the model must have {x0.shape[1]} output channels, got {output.shape[1]}")
        return {"loss": per_sample((noise - x0 - output.float()) ** 2)}


def make_loss(objective: str, **options: Any) -> NoiseLoss | FlowLoss:
    """Build the loss called "noise" or "flow"."""
    return {"noise": NoiseLoss, "flow": FlowLoss}[objective](**options)
