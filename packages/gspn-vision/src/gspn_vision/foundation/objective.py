"""What distillation compares: features of a teacher and a student, taken after their mixers and after their blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convert import blocks
from .grid import Grid
from .mixer import CompressedPropagation

TERMS = ("loss", "mixer_loss", "block_loss")


class Record(NamedTuple):
    """Of each block in order, tokens (N, T + H W, C): what its attention or mixer got, made, and the block made."""

    inputs: tuple[Tensor, ...] = ()
    mixed: tuple[Tensor, ...] = ()
    made: tuple[Tensor, ...] = ()


FEATURES = ("mixed", "made")  # what taps compare


class Recorder:
    """Records what passes through the blocks of a model, by hooks, until `take`.

    Args:
        model: of timm.
        kinds: fields of `Record` that are recorded, may be changed later. Others stay empty.
    """

    def __init__(self, model: nn.Module, kinds: Collection[str] = Record._fields) -> None:
        self.kinds = kinds
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self.blocks = list(blocks(model).values())
        self._hooks = []
        for number, block in enumerate(self.blocks):
            attention: Any = block.attn
            self._hooks.append(attention.register_forward_hook(self._attention_hook(number)))
            self._hooks.append(block.register_forward_hook(self._block_hook(number)))

    def _attention_hook(self, number: int) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            self._note("inputs", number, inputs[0])
            self._note("mixed", number, output)

        return hook

    def _block_hook(self, number: int) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            self._note("made", number, output)

        return hook

    def _note(self, kind: str, number: int, tensor: Tensor) -> None:
        if kind in self.kinds:
            self._tensors[kind, number] = tensor

    def take(self) -> Record:
        """Return the record of the last call, and forget it."""
        found, self._tensors = self._tensors, {}
        return Record(**{kind: tuple(found[kind, n] for n in range(len(self.blocks))) for kind in self.kinds})

    def clear(self) -> None:
        """Forget, as what the backward pass has computed again."""
        self._tensors = {}

    def remove(self) -> None:
        """Record no more."""
        for hook in self._hooks:
            hook.remove()


def enlarged(x: Tensor, prefix_tokens: int, old: Grid, new: Grid) -> Tensor:
    """Resample image tokens, (N, T + H W, C), bilinearly from one grid to another; prefix tokens stay."""
    if old == new:
        return x
    image = x[:, prefix_tokens:].transpose(1, 2).unflatten(2, old).float()
    image = F.interpolate(image, new, mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([x[:, :prefix_tokens], image.flatten(2).transpose(1, 2).to(x.dtype)], dim=1)


def difference(student: Tensor, teacher: Tensor, parts: Sequence[slice], kl_weight: float = 0.0) -> Tensor:
    r"""Return how far a student's features are from the teacher's, s and t of (N, L, C), a mean over images and parts:

        mean (s - t)^2 / v  +  kl_weight mean KL(softmax(t / sqrt v) || softmax(s / sqrt v)),   v = var t

    v is one number for each image and part of its tokens: the scale of a block's features does not weigh it, and an
    update does not depend on how its images are batched. Parts are the prefix tokens and those of the image; counted by
    tokens, a class token would hardly matter. PHI-S, by which GSPN-2 standardises, rotates the channels before it gives
    them one scale, which leaves the squared difference as it is.
    """
    total = torch.zeros((), device=student.device)
    for part in parts:
        s, t = student[:, part].float(), teacher[:, part].float()
        scale = (t.var((1, 2), correction=0, keepdim=True) + 1e-6).rsqrt()
        s, t = s * scale, t * scale
        total = total + F.mse_loss(s, t)
        if kl_weight:
            kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="sum")
            total = total + kl_weight * kl / (s.shape[0] * s.shape[1])
    return total / len(parts)


def parts_of(prefix_tokens: int) -> list[slice]:
    """Return the parts of a sequence that count alike: prefix tokens, if there are any, and image tokens."""
    return [slice(None, prefix_tokens), slice(prefix_tokens, None)] if prefix_tokens else [slice(None)]


class Alignment(nn.Module):
    """Stage 1: each mixer on the teacher's input of its attention, against the teacher's output, each for itself.

    Args:
        student: a converted model, whose mixers are trained.
        grid: of the teacher's tokens.
    """

    def __init__(self, student: nn.Module, grid: Grid) -> None:
        super().__init__()
        found = [block.attn for block in blocks(student).values()]
        self.numbers = [n for n, mixer in enumerate(found) if isinstance(mixer, CompressedPropagation)]
        self.mixers = nn.ModuleList(found[n] for n in self.numbers)  # type: ignore[misc]
        self.grid = grid

    def forward(self, images: Tensor, record: Record, features: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss, means over the mixers."""
        terms = []
        for number, mixer in zip(self.numbers, self.mixers, strict=True):
            parts = parts_of(mixer.prefix_tokens)  # type: ignore[arg-type]
            if not mixer.attends:
                parts = parts[-1:]  # dropped prefix tokens learn nothing
            made = mixer(record.inputs[number], grid=self.grid)
            terms.append(difference(made, record.mixed[number], parts))
        loss = torch.stack(terms).mean()
        return {"loss": loss, "mixer_loss": loss.detach(), "block_loss": torch.zeros_like(loss)}


class Distillation(nn.Module):
    """Stage 2: the student end to end, by its features after mixers and blocks, or by those after the last block.

    Args:
        student: a converted model.
        grids: of the teacher's tokens and of the student's; features are enlarged from one to the other.
        taps: compare after every mixer and block; otherwise the normalised features after the last block alone.
        adapters: MLPs between the student's features and the comparison, one for each tap but the last block's, whose
            features the classifier takes as they are. They begin as the identity and are thrown away afterwards.
        mixer_weight, block_weight, kl_weight: alpha, beta and l1 of alpha (MSE + l1 KL) + beta (MSE + l1 KL).
    """

    def __init__(
        self,
        student: Any,
        grids: tuple[Grid, Grid],
        *,
        taps: bool,
        adapters: bool,
        mixer_weight: float,
        block_weight: float,
        kl_weight: float,
    ) -> None:
        super().__init__()
        self.student, self.grids, self.taps = student, grids, taps
        self.weights, self.kl_weight = (mixer_weight, block_weight), kl_weight
        self.prefix_tokens = int(getattr(student, "num_prefix_tokens", 0))
        self.recorder = Recorder(student, FEATURES) if taps else None
        count, dim = len(blocks(student)), student.embed_dim
        adapted = (count, count - 1) if taps and adapters else (0, 0)  # mixers, blocks
        # What a mixer drops it cannot learn.
        self.parts = parts_of(self.prefix_tokens)
        drops = [getattr(block.attn, "attends", True) is False for block in blocks(student).values()]
        self.mixer_parts = [self.parts[-1:] if dropped else self.parts for dropped in drops]
        self.adapters = nn.ModuleList(
            nn.ModuleList(Adapter(dim) if n < some else nn.Identity() for n in range(count)) for some in adapted
        )

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that do not decay: timm's choice for the student, such as position embeddings."""
        names: Any = getattr(self.student, "no_weight_decay", set)
        return {f"student.{name}" for name in names()}

    def forward(self, images: Tensor, record: Record, features: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss; `features` are the teacher's after its last block, normalised."""
        own = self.student.forward_features(images)
        zero = torch.zeros((), device=own.device)
        if self.recorder is None:
            loss = self._difference(own, features, self.parts)
            return {"loss": loss, "mixer_loss": zero, "block_loss": loss.detach()}
        taken = self.recorder.take()
        mixer = self._mean(0, taken.mixed, record.mixed, self.mixer_parts)
        block = self._mean(1, taken.made, record.made, [self.parts] * len(record.made))
        alpha, beta = self.weights
        return {"loss": alpha * mixer + beta * block, "mixer_loss": mixer.detach(), "block_loss": block.detach()}

    def _mean(
        self, kind: int, own: Sequence[Tensor], theirs: Sequence[Tensor], parts: Sequence[Sequence[slice]]
    ) -> Tensor:
        adapters: Any = self.adapters[kind]
        taps = zip(adapters, own, theirs, parts, strict=True)
        return torch.stack([self._difference(adapter(s), t, some) for adapter, s, t, some in taps]).mean()

    def _difference(self, own: Tensor, theirs: Tensor, parts: Sequence[slice]) -> Tensor:
        theirs = enlarged(theirs, self.prefix_tokens, *self.grids)
        return difference(own, theirs, parts, self.kl_weight)


class Adapter(nn.Module):
    """x + W2 gelu(W1 x), with W2 = 0 at first; (..., C) to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the comparison sees of features."""
        adapted: Tensor = x + self.down(F.gelu(self.up(x)))
        return adapted
