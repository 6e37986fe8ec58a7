"""Samplers: diffusers' schedulers as trained with, a stochastic one for flows, and an adaptive one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from gspn_core.runs.errors import reason

SAMPLERS = {"noise": ("ancestral", "ddim"), "flow": ("euler", "heun", "sde", "dopri5")}

# Of the adaptive sampler, SiT's.
RTOL, ATOL = 1e-3, 1e-6


class FlowSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Sampling of a flow by its stochastic differential equation, with Euler-Maruyama steps.

    With x_t = (1 - t) x_0 + t e and the velocity v = e - x_0, the noise is e = x_t + (1 - t) v and the score -e / t.
    Every equation dx = (v - w score / 2) dt + sqrt(w) dW, run back in time, has the flow's marginals; with w = t

        x' = x - d (v + e / 2) + sqrt(t d) z,      d = t - t',  z ~ N(0, 1)

    The last step, to t = 0, is x' = x - t v, the mean.

    Source: SiT, arXiv 2401.08740, equation 6 and appendix.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Any:
        """Take one step; return an object with `prev_sample`."""
        if self.step_index is None:
            self._init_step_index(timestep)
        t, after = self.sigmas[self.step_index].item(), self.sigmas[self.step_index + 1].item()
        moved = super().step(model_output, timestep, sample)
        if after > 0:
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            drift = (sample + (1 - t) * model_output) / 2
            moved.prev_sample = moved.prev_sample - (t - after) * drift + (t * (t - after)) ** 0.5 * noise
        return moved


def make_scheduler(sampler: str, steps: int, time_shift: float = 1.0) -> Any:
    """Build the scheduler of a sampler, set to a number of steps; `time_shift` is of the flow's.

    Raises:
        ValueError: more steps than the 1000 trained with.
    """
    if sampler in SAMPLERS["noise"] and steps > 1000:
        raise ValueError(f"sampler_steps must be at most 1000, those trained with, got {steps}")
    linear: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler: Any
    if sampler == "ancestral":
        # Evenly spaced from 0 to 999, ADM's respacing; the scheduler's own default is not.
        scheduler = DDPMScheduler(
            **linear, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
        )
    elif sampler == "ddim":
        # DPM-Solver++ of first order is DDIM, arXiv 2211.01095, and steps to the next of its times; DDIMScheduler
        # steps by a fixed stride, which misses them where the steps do not divide 1000.
        scheduler = DPMSolverMultistepScheduler(
            **linear, solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero"
        )
    else:
        flows = {
            "euler": FlowMatchEulerDiscreteScheduler,
            "heun": FlowMatchHeunDiscreteScheduler,
            "sde": FlowSDEScheduler,
        }
        scheduler = flows[sampler](shift=time_shift)
    scheduler.set_timesteps(steps)
    return scheduler


def run_sampler(
    sampler: str,
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    *,
    steps: int,
    time_shift: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Turn noise into samples.

    Args:
        sampler: a name out of `SAMPLERS`.
        predict: maps x and a time from 0 to 1000 to the model's output.
        x: standard normal noise, (N, ...), float32.
        steps: of the sampler; "dopri5" takes as many as its error needs, those of all samples at once.
        time_shift: of the flow's times.
        generator: of the noise that "ancestral" and "sde" add, one or one per sample.

    Returns:
        Samples of x's shape.

    Raises:
        ValueError: more steps than trained with, or torchdiffeq, which "dopri5" needs, is not installed.
    """
    if sampler == "dopri5":
        odeint = _solver()
        found: Tensor = odeint(
            lambda t, x: predict(x, 1000 * t), x, torch.tensor([1.0, 0.0], device=x.device), rtol=RTOL, atol=ATOL
        )[-1]
        return found
    scheduler = make_scheduler(sampler, steps, time_shift)
    options = {"generator": generator} if sampler in ("ancestral", "sde") else {}
    for t in scheduler.timesteps:
        output = predict(x, t)
        if sampler == "ddim":
            output = output[:, : x.shape[1]]  # without the variance
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def _solver() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"sampler 'dopri5' needs torchdiffeq: pip install torchdiffeq ({reason(error)})") from None
    solve: Callable[..., Any] = odeint
    return solve
