"""The public functions of the operator: `propagate`, `propagate_low_rank`, `line_scan` and `row_stochastic`.

Shapes use the letters N batch, C channels, H rows, W columns, D directions, G weight groups. Every tensor is indexed
in image coordinates: the value of pixel (r, c) is at [..., r, c] for every direction, and nothing is flipped or
transposed before or after a scan.

A *line* is what a scan steps over, a *position* an index along it:

    left_to_right   line i = column i         position j = row j
    right_to_left   line i = column W-1-i     position j = row j
    top_to_bottom   line i = row i            position j = column j
    bottom_to_top   line i = row H-1-i        position j = column j

Sources: Wang et al., "Parallel Sequence Modeling via Generalized Spatial Propagation Network", CVPR 2025,
arXiv 2501.12381 (GSPN); Wang et al., "GSPN-2", NeurIPS 2025, arXiv 2512.07884.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _check, _library, _low_rank, reference
from ._directions import DIRECTIONS


def propagate(
    x: Tensor,
    logits: Tensor,
    lam: Tensor | None = None,
    u: Tensor | None = None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Propagate an image along lines in several directions and sum the results.

    For every direction d, with the row-stochastic weights w of the logits (see `row_stochastic`),

        h_d[i, j] = sum over k in -1, 0, +1 of w_k[i, j] h_d[i-1, j+k]  +  lam_d[i, j] x[i, j]
        y         = sum over d of u_d * h_d

    where h_d[-1] = 0 and terms outside the line are absent. On the first line of a chunk the weights have no effect.

    Args:
        x: (N, C, H, W).
        logits: (N, D, G, 3, H, W), G dividing C; each of the G groups serves C/G consecutive channels. Index 0, 1, 2
            of the axis of three is the neighbour at position j-1, j, j+1. G = C is GSPN-1, G = 1 is GSPN-2.
        lam: (N, D, C', H, W), C' dividing C, the input gate, shared by C/C' consecutive channels. None is 1.
        u: (N, D, C', H, W), the output gate, with a C' of its own. None is 1.
        directions: one to four different names out of `DIRECTIONS`, in the order of dimension D.
        chunk_size: lines per independent chunk (the local variant), counted in the direction's own scan order; the
            last chunk may be shorter. None scans the whole image.

    Returns:
        y, (N, C, H, W), contiguous, in the dtype of x.

    All tensors share one dtype, float32, float64, bfloat16 or float16, and one device; under autocast floating
    dtypes may differ and are cast to its lower precision, or to float64 beside a tensor of float64. Strides may be
    any. The state is kept in float32 (float64 for float64). On a CPU results are the same bit for bit whatever the
    number of threads and the other images of the batch. Differentiable once in x, logits, lam and u, in reverse mode
    and in forward mode.

    Raises:
        ValueError: a shape, a device, a direction or the chunk size does not fit; the message names it.
        TypeError: a dtype is not floating or differs from that of x, or an option is of the wrong type.
    """
    _check.check_tensors("x logits lam u", x, logits, lam, u, optional=2)
    indices, chunk_size = _check.direction_indices(directions), _check.chunk_size_argument(chunk_size)
    y: Tensor = _library.propagate(x, logits, lam, u, indices, chunk_size)[0]
    return y


def propagate_low_rank(
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    directions: Sequence[str] = DIRECTIONS,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Propagate an image with weights and gates of every channel that are a projection of R numbers a pixel.

    For every direction d and channel c, with row g of five of the projection,

        a_-1, a_0, a_+1, lam, u = weight[d, g, c] . r + bias[d, g, c]      g = 0, ..., 4

    at every pixel, and y is that of `propagate` with these logits a and gates lam and u. It is what a 1x1 convolution
    of r to 5 D C channels and `propagate` with G = C' = C compute, but the 5 D planes per channel are never in memory,
    neither here nor for the backward pass, which keeps the inputs and the state of every 16th line.

    Args:
        x: (N, C, H, W).
        r: (N, R, H, W), of a bottleneck, say.
        weight: (D, 5, C, R).
        bias: (D, 5, C).
        directions, chunk_size: as in `propagate`.

    Returns:
        y, (N, C, H, W), contiguous, in the dtype of x. Dtypes, strides, derivatives and errors as in `propagate`; the
        gates have the dtype of the state. Where there are no kernels for this, on a GPU for example, the planes of some
        channels at a time are in memory.

    Raises:
        ValueError: a shape, a device, a direction or the chunk size does not fit; the message names it.
        TypeError: a dtype is not floating or differs from that of x, or an option is of the wrong type.

    Source: the gates of GSPN-1, arXiv 2501.12381, section 3.
    """
    _check.check_tensors("x r weight bias", x, r, weight, bias)
    indices, chunk_size = _check.direction_indices(directions), _check.chunk_size_argument(chunk_size)
    y: Tensor = _low_rank.propagate_low_rank(x, r, weight, bias, indices, chunk_size)[0]
    return y


def line_scan(
    x: Tensor, weights: Tensor, lam: Tensor | None = None, *, direction: str, chunk_size: int | None = None
) -> Tensor:
    r"""Scan an image along one direction with weights that may be any real numbers.

        h[i, j] = sum over k in -1, 0, +1 of weights_k[i, j] h[i-1, j+k]  +  lam[i, j] x[i, j]

    with h[-1] = 0 and terms outside the line absent.

    Args:
        x: (N, C, H, W).
        weights: (N, G, 3, H, W), G dividing C; index 0, 1, 2 of the axis of three is position j-1, j, j+1.
        lam: (N, C', H, W), C' dividing C. None is 1.
        direction: one of `DIRECTIONS`.
        chunk_size: lines per independent chunk, as in `propagate`.

    Returns:
        h, (N, C, H, W), contiguous, in the dtype of x. Dtypes, strides, derivatives and errors as in `propagate`.

    Raises:
        ValueError: a shape, a device, the direction or the chunk size does not fit; the message names it.
        TypeError: a dtype is not floating or differs from that of x, or an option is of the wrong type.
    """
    _check.check_tensors("x weights lam", x, weights, lam, optional=1)
    index, chunk_size = _check.direction_index(direction), _check.chunk_size_argument(chunk_size)
    h: Tensor = _library.line_scan(x, weights, lam, index, chunk_size)[0]
    return h


def row_stochastic(logits: Tensor, *, directions: Sequence[str] = DIRECTIONS) -> Tensor:
    r"""Normalise logits to the weights that `propagate` uses (the stability-context condition).

        w_k = sigmoid(a_k) / sum of sigmoid(a_k') over the neighbours that exist

    Three neighbours inside a line, two at its ends, one where a line has a single position; the weight of a missing
    neighbour is 0. Logits below -28 count as -28.

    Args:
        logits: (N, D, G, 3, H, W).
        directions: one name out of `DIRECTIONS` for each entry of dimension D.

    Returns:
        The weights, in the shape and dtype of logits; `weights[:, d]` is what `line_scan` takes. Differentiable.

    Raises:
        ValueError: the shape does not fit the directions, or a direction is unknown.
        TypeError: the dtype is not floating.
    """
    _check.check_tensors("logits", logits)
    _check.check_logits(logits, _check.direction_indices(directions))
    return reference.row_stochastic(logits, directions=directions)
