"""The denoiser and its loss written out as formulas, independently of the package: slow, and in any precision."""

import math

import torch
from torch.nn import functional as F

from gspn_core import reference


def plain_forward(w, config, x, t, labels):
    """The model as formulas on its weights by name, in the dtype of x, with the reference scan."""
    patch = config.patch_size
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=x.dtype) / 128)
    angles = t.to(x.dtype)[:, None] * frequencies
    times = torch.cat((angles.cos(), angles.sin()), dim=1)
    hidden = F.silu(times @ w["time_embed.linear_1.weight"].T + w["time_embed.linear_1.bias"])
    c = hidden @ w["time_embed.linear_2.weight"].T + w["time_embed.linear_2.bias"] + w["class_embed.weight"][labels]

    def norm(x, eps):
        mean = x.mean(1, keepdim=True)
        return (x - mean) / ((x - mean).square().mean(1, keepdim=True) + eps).sqrt()

    def pointwise(x, name):
        y = torch.einsum("oi,nihw->nohw", w[f"{name}.weight"][..., 0, 0], x)
        bias = w.get(f"{name}.bias")
        return y if bias is None else y + bias[:, None, None]

    def depthwise(x, name):
        kernel = w[f"{name}.weight"]
        return F.conv2d(x, kernel, w.get(f"{name}.bias"), padding=kernel.shape[-1] // 2, groups=len(kernel))

    def propagate(x, name):
        n, channels, height, wide = x.shape
        gates = pointwise(pointwise(x, f"{name}.bottleneck"), f"{name}.gates")
        proxy = config.proxy_channels
        p, g = (channels, channels) if proxy is None else (proxy, 1)
        logits = gates[:, : 12 * g].view(n, 4, g, 3, height, wide)
        lam = gates[:, 12 * g : 12 * g + 4 * p].view(n, 4, p, height, wide)
        u = gates[:, 12 * g + 4 * p :].view(n, 4, p, height, wide) * w[f"{name}.merge"].view(4, 1, 1, 1)
        v = x if proxy is None else pointwise(x, f"{name}.value")
        y = reference.propagate(v, logits, lam, u)
        return y if proxy is None else pointwise(y, f"{name}.lift")

    def block(x, name):
        y = norm(x, 1e-5) * w[f"{name}.norm.weight"][:, None, None] + w[f"{name}.norm.bias"][:, None, None]
        y = propagate(depthwise(pointwise(y, f"{name}.proj_in"), f"{name}.conv"), f"{name}.propagation")
        y = depthwise(pointwise(y, f"{name}.mix"), f"{name}.local")
        return x + pointwise(y * y.clamp(min=0), f"{name}.proj_out")

    x = F.conv2d(x, w["patch_embed.weight"], w["patch_embed.bias"], stride=patch) + c[:, :, None, None]
    half = config.num_layers // 2
    skips = []
    for place in range(half):
        x = block(x, f"in_blocks.{place}")
        skips.append(x)
    x = block(x, "middle_block")
    for place in range(half):
        joined = torch.cat((x, skips[half - 1 - place]), dim=1)
        x = block(pointwise(joined, f"out_blocks.{place}.fuse"), f"out_blocks.{place}")
    shift, scale = (F.silu(c) @ w["final.modulation.weight"].T + w["final.modulation.bias"]).chunk(2, dim=1)
    x = norm(x, 1e-6) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    x = pointwise(x, "final.proj")  # (N, O P P, H, W)
    n, _, height, width = x.shape
    x = x.view(n, -1, patch, patch, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, -1, height * patch, width * patch)


def plain_noise_loss(output, x0, noise, t):
    """Mean of squared error of the noise plus the variational bound in bits, by Bayes' rule on Gaussians."""
    predicted, v = output.chunk(2, dim=1)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    product = torch.cumprod(1 - betas, 0)
    losses = []
    for i, step in enumerate(t.tolist()):
        beta, now = betas[step], product[step]
        before = product[step - 1] if step else torch.ones((), dtype=torch.float64)
        xt = now.sqrt() * x0[i] + (1 - now).sqrt() * noise[i]
        guess = (xt - (1 - now).sqrt() * predicted[i].detach()) / now.sqrt()

        def posterior_mean(x, before=before, beta=beta, xt=xt):
            # The product of N(x_{t-1}; sqrt(before) x, 1 - before) and N(x_t; sqrt(1 - beta) x_{t-1}, beta).
            if before == 1:
                return x
            precision = 1 / (1 - before) + (1 - beta) / beta
            return (before.sqrt() * x / (1 - before) + (1 - beta).sqrt() * xt / beta) / precision

        def posterior_variance(step):
            step = max(step, 1)  # that of step 0 is zero
            return 1 / (1 / (1 - product[step - 1]) + (1 - betas[step]) / betas[step])

        variance = posterior_variance(step)
        share = (v[i] + 1) / 2
        scale = (share * beta.log() + (1 - share) * variance.log()).mul(0.5).exp()
        ours = torch.distributions.Normal(posterior_mean(guess), scale)
        if step > 0:
            truth = torch.distributions.Normal(posterior_mean(x0[i]), variance.sqrt())
            bound = torch.distributions.kl_divergence(truth, ours).mean()
        else:
            upper = torch.where(x0[i] > 0.999, 1.0, ours.cdf(x0[i] + 1 / 255))
            lower = torch.where(x0[i] < -0.999, 0.0, ours.cdf(x0[i] - 1 / 255))
            bound = -(upper - lower).clamp(min=1e-12).log().mean()
        losses.append((noise[i] - predicted[i]).square().mean() + bound / math.log(2))
    return torch.stack(losses)
