"""Replaces the attention of a timm model by propagation, in place."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

from .grid import GridBlock, GridModel, grid_class, note_grid
from .mixer import SHARE, CompressedPropagation

Keep = Sequence[int] | float | str


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a timm model's transformer blocks by name, in order: each has its attention, or mixer, as `attn`."""
    found = getattr(model, "blocks", None)
    if not isinstance(found, (nn.Sequential, nn.ModuleList)):
        return {}
    return {
        f"blocks.{i}": block for i, block in enumerate(found) if isinstance(getattr(block, "attn", None), nn.Module)
    }


def mixers(model: nn.Module) -> dict[str, CompressedPropagation]:
    """Return the mixers of a converted model by name, in order; in the original these names are its attentions."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedPropagation)}


def kept_blocks(keep: Keep, depth: int) -> set[int]:
    """Return the indices, from 0, of the blocks that keep their attention.

    Args:
        keep: indices, negative ones count from the end; "every n", blocks n, 2n, ... counted from 1; or a share of the
            blocks, spread evenly and ending with the last, such as 1/6 for 6, 12, 18 and 24 of 24, counted from 1.
        depth: number of blocks.

    Raises:
        ValueError: it is none of these.
    """
    wrong = f"keep must be indices of {depth} blocks, 'every n' or a share from 0 to 1, got {keep!r}"
    if isinstance(keep, str):
        word, _, step = keep.partition(" ")
        if word != "every" or not step.isdecimal() or int(step) < 1:
            raise ValueError(wrong)
        return set(range(int(step) - 1, depth, int(step)))
    if isinstance(keep, numbers.Real):
        share = float(keep)
        if isinstance(keep, bool) or not 0 <= share <= 1:
            raise ValueError(wrong)
        count = round(share * depth)
        return {round(i * depth / count) - 1 for i in range(1, count + 1)}
    if not isinstance(keep, Iterable) or not all(_is_index(i, depth) for i in keep):
        raise ValueError(wrong)
    return {int(i) % depth for i in keep}


def _is_index(i: object, depth: int) -> bool:
    return isinstance(i, numbers.Integral) and not isinstance(i, bool) and -depth <= int(i) < depth


def convert(
    model: nn.Module,
    *,
    keep: Keep = (),
    latent: float = SHARE,
    weight_groups: int | Literal["channels"] = 1,
    chunk_size: int | None = None,
    prefix: Literal["attend", "drop"] = "attend",
) -> nn.Module:
    """Replace the attention of a timm model's blocks by `CompressedPropagation`, in place; return the model.

    Any model of one sequence of blocks with attention: ViT, DeiT, DINOv2 and v3, EVA-02, SigLIP and the like. Weights
    stay what they are but the mixers', which are random, and need distillation. In them prefix tokens read by the
    projections of timm's dot-product attention, if its queries and keys have no norms. Attention that pools stays. The
    model compiles, exports, and goes through torch.fx; TorchScript takes that graph, but not the model itself.

    Args:
        model: any such timm model, on any device, in any dtype.
        keep: blocks that keep their attention: indices such as [5, 11] or [-1], "every 6", or a share such as 1/9 (see
            `kept_blocks`).
        latent, weight_groups, chunk_size, prefix: see `CompressedPropagation`.

    Raises:
        TypeError: it is no module.
        ValueError: there is nothing to replace, the model was converted before, its tokens are no grid (NaFlex, dropped
            patches), or an argument does not fit.

    Sources: C-GSPN, CVPR 2026, arXiv 2606.00746; GSPN-2, arXiv 2512.07884, appendices E and F.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a timm model, got a {type(model).__name__}")
    found = blocks(model)
    _check(model, found)
    kept = kept_blocks(keep, len(found))
    options: dict[str, Any] = {
        "latent": latent,
        "weight_groups": weight_groups,
        "chunk_size": chunk_size,
        "prefix": prefix,
        "prefix_tokens": getattr(model, "num_prefix_tokens", 0),
    }
    made = {name: _mixer(block, options) for i, (name, block) in enumerate(found.items()) if i not in kept}
    if not made:
        return model
    changed: Any = model
    recompute = bool(getattr(model, "grad_checkpointing", False))
    before = type(model), {name: (type(block), block.attn) for name, block in found.items()}
    block: Any
    for name, block in found.items():
        if name in made:
            block.attn = made[name]
        block.__class__ = _with(GridBlock, block)
    changed.__class__ = _with(GridModel, model)
    hook = changed.patch_embed.register_forward_hook(note_grid)
    try:
        _try(changed)
    except ValueError:
        hook.remove()
        changed.__class__ = before[0]
        for name, block in found.items():
            block.__class__, block.attn = before[1][name]
        raise
    if recompute:
        changed.set_grad_checkpointing()
    return model


@torch.no_grad()
def _try(model: Any) -> None:
    """Run a converted model on one image, of 0: whether its blocks get the tokens of one grid shows there.

    Raises:
        ValueError: they do not, as where the class token joins later.
    """
    patches, training = model.patch_embed, model.training
    weight = next(model.patch_embed.parameters())
    size = getattr(patches, "img_size", None) or model.pretrained_cfg["input_size"][1:]
    if not getattr(patches, "strict_img_size", True):
        size = [-(-side // patch) * patch for side, patch in zip(size, patches.patch_size, strict=True)]
    channels = getattr(getattr(patches, "proj", None), "in_channels", None) or model.pretrained_cfg["input_size"][0]
    try:
        model.eval().forward_features(torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        name = type(model).__name__
        raise ValueError(f"model must give its blocks the tokens of one grid, a {name} does not: {error}") from None
    finally:
        model.train(training)


def _with(mixin: Any, module: Any) -> Any:
    base: Any = type(module)
    return grid_class(mixin, base)


def _mixer(block: Any, options: dict[str, Any]) -> CompressedPropagation:
    """Return a mixer for a block's attention, where its weights are."""
    weight = next(m for m in block.attn.modules() if isinstance(m, nn.Linear)).weight
    mixer = CompressedPropagation(
        weight.shape[1],
        num_heads=math.gcd(getattr(block.attn, "num_heads", 1), weight.shape[1]),
        device=weight.device,
        dtype=weight.dtype,
        **options,
    )
    copy_projections(block.attn, mixer)
    return mixer.train(block.attn.training)


@torch.no_grad()
def copy_projections(attention: Any, mixer: CompressedPropagation) -> bool:
    """Let prefix tokens read by an attention's projections, if it is dot-product attention; tell whether they do.

    They read what they read before then, without rotary embeddings. Attention with norms or gates between its
    projections is left alone. A bias of the keys is dropped, which the softmax cancels.
    """
    if not isinstance(attention, (Attention, AttentionRope, EvaAttention)):
        return False
    between = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    if not mixer.attends or not all(isinstance(module, (nn.Identity, type(None))) for module in between):
        return False
    weights: Any
    biases: Any = [getattr(attention, f"{name}_bias", None) for name in "qkv"]
    if getattr(attention, "qkv", None) is not None:
        weights = attention.qkv.weight.chunk(3)
        biases = biases if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    else:
        layers: Any = [getattr(attention, f"{name}_proj") for name in "qkv"]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    read = [(mixer.q, weights[0], biases[0]), (mixer.k, weights[1], None), (mixer.v, weights[2], biases[2])]
    read.append((mixer.out, attention.proj.weight, attention.proj.bias))
    if any(weight.shape != layer.weight.shape for layer, weight, _ in read):
        return False
    for layer, weight, bias in read:
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return True


def _check(model: Any, found: dict[str, nn.Module]) -> None:
    """Refuse a model that cannot be converted."""
    name = type(model).__name__
    if isinstance(model, GridModel) or mixers(model):
        raise ValueError(f"model must have attention in its blocks, this {name} was converted before")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("model must be converted before it is compiled, got one of torch.compile")
    if type(model).__name__ == "NaFlexVit":
        raise ValueError(
            "model must have one grid of patches per batch, got a NaFlexVit, which packs images of any sizes"
        )
    if not found or len(found) != len(model.blocks):
        raise ValueError(f"model must be a timm model whose blocks have attention, a {name} has nothing to replace")
    if not callable(getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)):
        raise ValueError(f"model must have a patch embedding that tells its grid, a {name} has none")
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        raise ValueError("model must keep all patches, since fewer are no grid: its patch_drop_rate must be 0")
