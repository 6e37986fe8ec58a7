"""Which kernels serve a call, and how they are launched: mirrors plan.hpp, vectors.cuh and launch.cuh in csrc/cuda.

For tensors that are dense and aligned, on a device of compute capability 9.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMS = 132  # multiprocessors
BLOCK_SHARED = 232448  # bytes of shared memory that one block may have
INTERVAL = 16  # lines between checkpoints
FORWARD, SAVING, BACKWARD = PASSES = ("forward", "forward, checkpoints saved", "backward")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Cover = tuple[int, int, int, int]  # P, K, CW, SEG, as in step.cuh
LONG: Cover = (4, 4, 1, 1)
NARROW: Cover = (2, 4, 1, 1)  # of vertical scans with fewer warps than FEW_WARPS of a multiprocessor
FEW_WARPS, FEW_STOCHASTIC_WARPS = 12, 4
VECTOR_LENGTH = 32  # shorter lines take the general kernels
SHORT: tuple[Cover, ...] = ((1, 8, 1, 4), (1, 8, 1, 2), (1, 8, 1, 1), (2, 8, 1, 1), LONG)
FUSED = ((16, (4, 4, 1, 8)), (32, (4, 4, 1, 4)), (64, (4, 4, 1, 2)), (128, LONG))  # by the longest line
SHARED_COVERS = ((7, (7, 1, 1, 32)), (14, (7, 1, 1, 16)), (28, (7, 1, 1, 8)), (56, (7, 1, 1, 4)))
SHARED_COVERS += ((80, (5, 1, 1, 2)), (128, (5, 1, 1, 1)))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A call: `lam` and `u` are the channels of the gates, 0 without; `logits` as propagate has them."""

    name: str
    size: tuple[int, int, int, int]  # (H, W, N, C)
    groups: int
    lam: int
    u: int
    dtype: str = "bfloat16"
    directions: tuple[str, ...] = ("left_to_right", "right_to_left", "top_to_bottom", "bottom_to_top")
    logits: bool = True

    def planes(self) -> tuple[float, float]:
        """Return the planes of weights and of gates, per (n, c, pixel)."""
        count, c = len(self.directions), self.size[3]
        return 3 * count * self.groups / c, count * (self.lam + self.u) / c

    def floor_bytes(self, which: str) -> float:
        """Return what a pass must move: inputs read once, outputs written once."""
        weights, gates = self.planes()
        planes = 3 + 2 * weights + 2 * gates if which == BACKWARD else 2 + weights + gates
        saved = 0 if which == FORWARD else len(self.directions) * 4 / INTERVAL
        return (planes * BYTES[self.dtype] + saved) * math.prod(self.size)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel's launch: `lines` follow one another in a warp, `lanes` is the share of the lanes with a position."""

    function: str
    cover: Cover
    flags: tuple[bool, ...]
    directions: int
    lines: int
    blocks: int
    warps: int
    lanes: float
    shared: int = 0
    strips: int = 1
    cluster: int = 1

    def key(self, dtype: str) -> tuple[object, ...]:
        """Return what kernels of budget.json are found by."""
        return self.function, dtype, self.cover, self.flags


def launches(shape: Shape, which: str, sms: int = SMS) -> list[Launch]:
    """Return the launches of a pass; small ones that prepare or finish are counted by `small_launches`."""
    h, w = shape.size[:2]
    if which != BACKWARD and len(shape.directions) > 1 and max(h, w) <= 128 and (whole := _whole(shape, sms)):
        return [whole]
    return [_direction(shape, which, d, sms) for d in shape.directions]


def _whole(shape: Shape, sms: int) -> Launch | None:
    """Return the launch of all directions at once: of weights of every channel, of shared ones, or of any."""
    return _fused(shape) or _shared(shape, sms) or _resident(shape)


def _axes(shape: Shape) -> tuple[int, int, float]:
    """Return the lines of all directions one after another, of opposite ones side by side, and their mean length."""
    h, w, _, _ = shape.size
    horizontal = sum("left" in direction for direction in shape.directions)
    vertical = len(shape.directions) - horizontal
    pairs = math.ceil(horizontal / 2) * w + math.ceil(vertical / 2) * h
    return horizontal * w + vertical * h, pairs, (horizontal * h + vertical * w) / (horizontal + vertical)


def _fused(shape: Shape) -> Launch | None:
    h, w, n, c = shape.size
    lines, _, positions = _axes(shape)
    cover = next(cover for most, cover in FUSED if max(h, w) <= most)
    inputs = 6 * 4672 if any("left" in direction for direction in shape.directions) else 0
    shared = inputs + 16 * cover[3] * (h * (w // 4) + h // 4)
    linear = shape.groups == c and {shape.lam, shape.u} <= {0, 1, c}
    if not shape.logits or not linear or h % 4 or w % (16 // BYTES[shape.dtype]) or shared > BLOCK_SHARED:
        return None
    about = {"lines": lines, "blocks": n * math.ceil(c / cover[3]), "warps": 1, "lanes": positions * cover[3] / 128}
    return Launch(
        function="fused_forward", cover=cover, flags=(), directions=len(shape.directions), shared=shared, **about
    )


def _shared(shape: Shape, sms: int) -> Launch | None:
    (h, w, n, c), bytes_ = shape.size, BYTES[shape.dtype]
    if not shape.logits or math.gcd(*(c // k for k in (shape.groups, shape.lam, shape.u) if k)) < 8:
        return None
    _, lines, positions = _axes(shape)
    cover = next(cover for most, cover in SHARED_COVERS if max(h, w) <= most)
    segments, segment = cover[3], 32 * cover[0] // cover[3]
    step, share = min(segments, 8), 64 // segments
    pitch = (segment + step - 2) // step * step + 1
    plane = h * pitch + (segment - h * pitch) % 32
    xs = plane if bytes_ == 4 or segments == 1 else (plane - share + 63) // 64 * 64 + share
    channel, slack = plane * 4 + xs * bytes_, bytes_ * max(0, segment - h) * pitch
    warps = min(4, math.ceil(c / segments), (BLOCK_SHARED - slack) // (segments * channel))
    while warps > 1 and n * math.ceil(c / (warps * segments)) < sms:
        warps -= 1
    if warps < 1:
        return None
    about = {"lines": lines, "blocks": n * math.ceil(c / (warps * segments)), "warps": 2 * warps}
    about |= {"shared": warps * segments * channel + slack, "directions": len(shape.directions)}
    return Launch(function="shared_forward", cover=cover, flags=(), lanes=positions / segment, **about)


def _resident(shape: Shape) -> Launch | None:
    (h, w, n, _), bytes_ = shape.size, BYTES[shape.dtype]
    _, lines, positions = _axes(shape)
    for sharing in (4, 1):
        cover = _cover(shape, max(h, w), sharing, 4)
        p, k, cw, segments = cover
        tiles = 2 * ((2 if shape.logits else 3) + cw) * k * (32 * p + 4)
        shared = 4 * tiles + cw * segments * h * (w | 1) * (4 + bytes_)
        if shared <= BLOCK_SHARED:
            about = {"lines": lines, "blocks": n * _blocks(shape, cover), "warps": 2 * cw, "shared": shared}
            about |= {"directions": len(shape.directions)}
            return Launch(
                function="resident_forward", cover=cover, flags=(), lanes=positions * segments / 32 / p, **about
            )
    return None


def _direction(shape: Shape, which: str, direction: str, sms: int) -> Launch:
    """Return the launch of one direction: of rows of vectors where their tiles fit shared memory, or of any strides."""
    h, w, _, c = shape.size
    bytes_, backward, horizontal = BYTES[shape.dtype], which == BACKWARD, "left" in direction
    owns = shape.groups == c and {shape.lam, shape.u} <= {0, c}
    cover = LONG if horizontal or not _has_few_warps(shape, backward, sms) else NARROW
    fits = h % 4 == 0 and w % (INTERVAL if backward else 16 // bytes_) == 0 if horizontal else w % cover[0] == 0
    suffix = "backward" if backward else "forward"
    fits = fits and (h if horizontal else w) >= VECTOR_LENGTH
    if fits and (owns or not backward):
        flags = (shape.logits, direction == "right_to_left") if horizontal else (shape.logits,)
        name = f"{'row' if horizontal else 'column'}_{suffix}"
        if launch := _cut(shape, name, cover, flags, horizontal, _tile_bytes(shape, name, cover), sms):
            return launch
    cover = _cover(shape, h if horizontal else w, 4, 2 if backward else 4)
    launch = _cut(shape, f"strip_{suffix}", cover, (horizontal,), horizontal, 0, sms)  # a few KiB, which limit nothing
    assert launch is not None
    return launch


def _has_few_warps(shape: Shape, backward: bool, sms: int) -> bool:
    """Tell whether a vertical scan is left to narrow warps."""
    _, w, n, _ = shape.size
    strips = 1 if w <= 128 else math.ceil(w / 120)
    few = FEW_STOCHASTIC_WARPS if shape.logits and not backward else FEW_WARPS
    return n * _blocks(shape, LONG) * strips < few * sms


def _tile_bytes(shape: Shape, name: str, cover: Cover) -> int:
    """Return the shared memory of a warp that reads rows of vectors, beside what strips exchange."""
    bytes_, gates = BYTES[shape.dtype], bool(shape.lam) + bool(shape.u)
    if name == "column_backward":
        return 32 * cover[0] * ((INTERVAL + 1) * 4 + 3 * INTERVAL * bytes_)
    if name == "row_forward":
        stage = -(-4672 * (5 if shape.lam else 4) // 128) * 128
        return stage + (4736 if bytes_ == 2 else 0)  # a stage, and room for states
    if name == "row_backward":  # inputs, the gradient of x where its type differs, and states
        return (5 + gates) * 512 * (4 * bytes_ + 1) + (8704 if bytes_ == 2 else 0) + 17 * 512
    return 0


def _cut(
    shape: Shape, name: str, cover: Cover, flags: tuple[bool, ...], horizontal: bool, shared: int, sms: int
) -> Launch | None:
    """Cut lines into strips for blocks and clusters; None if their memory does not suffice."""
    h, w, n, _ = shape.size
    (p, k, cw, segments), (length, lines) = cover, (h, w) if horizontal else (w, h)
    strips = 1 if length <= 32 * p // segments else math.ceil(length / (32 * p - 2 * k))
    backward, narrow = "backward" in name, cover == NARROW
    most = (10 if narrow else 8) if backward else (16 if shape.logits else 20) if narrow else 12
    cluster, blocks = 1, n * _blocks(shape, cover)

    def per_block() -> int:
        return math.ceil(strips / cluster)

    while per_block() * cw > most or per_block() * shared > BLOCK_SHARED:
        cluster *= 2
        if cluster > 8:
            return None
    while cluster < 8 and per_block() > 1 and blocks * cluster * 2 <= sms:
        cluster *= 2
    about = {"lines": lines, "blocks": blocks * cluster, "warps": per_block() * cw, "shared": per_block() * shared}
    about |= {"strips": strips, "cluster": cluster, "directions": 1}
    lanes = length / (per_block() * cluster * 32 * p / segments)
    return Launch(function=name, cover=cover, flags=flags, lanes=lanes, **about)


def _cover(shape: Shape, length: int, sharing: int, most_segments: int) -> Cover:
    for p, k, cw, segments in SHORT:
        if length <= 32 * p // segments and segments <= most_segments:
            return p, k, sharing if segments == 1 and shape.size[3] > shape.groups else cw, segments
    return LONG


def _blocks(shape: Shape, cover: Cover) -> int:
    c, group = shape.size[3], shape.size[3] // shape.groups
    return shape.groups * math.ceil(group / cover[2]) if cover[2] > 1 else math.ceil(c / cover[3])


def small_launches(shape: Shape, launch: Launch) -> int:
    """Return the kernels before or after a launch: one lays shared weights out, up to three sum over channels."""
    group, cw = shape.size[3] // shape.groups, launch.cover[2]
    weights = group > cw  # otherwise one block sums a group
    gates = sum(0 < count < shape.size[3] for count in (shape.lam, shape.u))
    return {"shared_forward": 1, "strip_backward": weights + gates}.get(launch.function, 0)
