r"""The loss of a distillation: against the noise, the teacher's prediction, and the outputs of its self-attentions.

    L = a |s - target|^2 + b |s - t|^2 + c mean over layers of |f_s - f_t|^2

s and t are the predictions of student and teacher for the same noisy latents, f the outputs of each self-attention and
of the mixer in its place; each term is a mean over elements. Published: a = 1, b = c = 1/2.

Sources: GSPN, arXiv 2501.12381, text to image; min-SNR weights, Hang et al. 2023, arXiv 2303.09556.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import self_attentions

TERMS = ("loss", "noise", "teacher", "feature")


class Taps:
    """The outputs of named self-attentions, or of their mixers, in a UNet's last forward pass.

    Kept by name, as recomputed activations run a hook twice.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        modules = self_attentions(unet)
        for name in names:
            modules[name].register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.outputs[name] = output

        return keep

    def take(self) -> dict[str, Tensor]:
        """Return the outputs and forget them."""
        outputs, self.outputs = self.outputs, {}
        return outputs


def training_schedule(config: Mapping[str, Any]) -> DDPMScheduler:
    """Return the noise schedule that a pipeline was trained with, from the configuration of its sampler.

    Raises:
        ValueError: the UNet predicts neither noise nor velocity.
    """
    schedule = DDPMScheduler.from_config(config)
    kind = schedule.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"the pipeline's prediction_type must be epsilon or v_prediction, got {kind!r}")
    return schedule


@dataclass(frozen=True)
class Objective:
    """Weights of the three terms, and the schedule.

    Args:
        schedule: of the noise.
        noise, teacher, feature: a, b and c.
        snr_gamma: limit of min-SNR weights of the first two terms; None weights all times alike.
    """

    schedule: DDPMScheduler
    noise: float = 1.0
    teacher: float = 0.5
    feature: float = 0.5
    snr_gamma: float | None = None

    def target(self, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what the UNet should predict: the noise, or the velocity (Salimans and Ho 2022)."""
        if self.schedule.config.prediction_type == "epsilon":
            return noise
        velocity: Tensor = self.schedule.get_velocity(x0, noise, times)
        return velocity

    def time_weights(self, times: Tensor) -> Tensor:
        """Return (N,) weights: min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity; 1 without gamma."""
        if self.snr_gamma is None:
            return torch.ones(len(times), device=times.device)
        snr: Tensor = compute_snr(self.schedule, times)
        if self.schedule.config.prediction_type == "v_prediction":
            return snr.clamp(max=self.snr_gamma) / (snr + 1)
        # As the SNR goes to 0, at a zero terminal SNR, the weight goes to 1.
        return torch.where(snr > 0, snr.clamp(max=self.snr_gamma) / snr, torch.ones_like(snr))

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        times: Tensor,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the loss and its terms, each a scalar, by the names of `TERMS`.

        The first two terms are weighted by time.

        Args:
            student, teacher, target: (N, C, H, W).
            times: (N,).
            student_features, teacher_features: by layer.
        """
        weights = self.time_weights(times)

        def distance(other: Tensor) -> Tensor:
            return (weights * F.mse_loss(student.float(), other.float(), reduction="none").mean((1, 2, 3))).mean()

        zero = torch.zeros((), device=student.device)
        layers = [F.mse_loss(f.float(), teacher_features[name].float()) for name, f in student_features.items()]
        terms = {
            "noise": distance(target),
            "teacher": distance(teacher),
            "feature": torch.stack(layers).mean() if layers else zero,
        }
        loss = self.noise * terms["noise"] + self.teacher * terms["teacher"] + self.feature * terms["feature"]
        return {"loss": loss, **terms}
