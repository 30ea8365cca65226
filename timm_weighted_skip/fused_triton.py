"""The steps of `fused` on a GPU: Triton kernels that pass over the maps once each.

A map (N, C, H, W) is taken as N rows of C * H * W elements in the order in which they lie in memory, so that one kernel
serves contiguous and channels-last maps. A program handles `BLOCK` elements of one image or, where it sums by channel,
`SIDE` pixels of `SIDE` channels. Maps of any precision are summed in 32 bits, those of 64 bits in 64, and always in the
same order. tests/test_fused_triton.py holds the kernels equal to the plain formulas.
"""

import math
from typing import Any, Optional

import torch
import triton
import triton.language as tl

BLOCK = 4096
SIDE = 64
LAYOUTS = (torch.contiguous_format, torch.channels_last)
OPTIONS = dict(enable_fp_fusion=True)  # Triton 3.9 warns where this is left to its default, which will change


def check(device: torch.device) -> None:
    """Raise what Triton does if it can't run a kernel on `device`."""
    x = torch.zeros(1, 1, 1, 1, device=device)
    skip_relu(x, x, x.sum())


def can_take(*maps: torch.Tensor) -> bool:
    """Whether all `maps` lie in the same dense order, with offsets in an image of 32 bits."""
    return layout_of(*maps) is not None and maps[0][0].numel() < 2**31 - BLOCK


def layout_of(*maps: torch.Tensor) -> Optional[torch.memory_format]:
    """The dense layout that all `maps` have, if there is one."""
    for layout in LAYOUTS:
        if all(x.is_contiguous(memory_format=layout) for x in maps):
            return layout
    return None


@triton.jit
def _load(pointer, at, inside, ACC: tl.constexpr):
    return tl.load(pointer + at, mask=inside, other=0).to(ACC)


@triton.jit
def _elements(size, BLOCK: tl.constexpr):
    """This program's image, its elements' offsets in the image, and which of them exist."""
    blocks = tl.cdiv(size, BLOCK)
    offset = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), offset, offset < size


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # lets NaN through, as torch's does


@triton.jit
def _skip_relu(y, residual, shortcut, weight, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    image, offset, inside = _elements(size, BLOCK)
    at = image * size + offset
    merged = _load(residual, at, inside, ACC) + tl.load(weight).to(ACC) * _load(shortcut, at, inside, ACC)
    tl.store(y + at, _relu(merged), mask=inside)


@triton.jit
def _mapping_relu(
    y,
    partial,
    residual,
    shortcut,
    weight,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    SIDE: tl.constexpr,
):
    columns, program = tl.cdiv(pixels, SIDE), tl.program_id(0).to(tl.int64)
    image, column = program // columns, (program % columns).to(tl.int32)
    channel, pixel = tl.program_id(1) * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    if CHANNELS_LAST:
        offset = channel[:, None] + pixel[None, :] * channels
    else:
        offset = channel[:, None] * pixels + pixel[None, :]
    at = image * channels * pixels + offset
    merged = tl.load(weight + 2 * image).to(ACC) * _load(residual, at, inside, ACC)
    merged += tl.load(weight + 2 * image + 1).to(ACC) * _load(shortcut, at, inside, ACC)
    output = _relu(merged)
    tl.store(y + at, output, mask=inside)
    tl.store(partial + program * channels + channel, tl.sum(output, axis=1), mask=channel < channels)


@triton.jit
def _dots(partial, grad, residual, shortcut, weight, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    image, offset, inside = _elements(size, BLOCK)
    at = image * size + offset
    f, s = _load(residual, at, inside, ACC), _load(shortcut, at, inside, ACC)
    merged = tl.load(weight + 2 * image).to(ACC) * f + tl.load(weight + 2 * image + 1).to(ACC) * s
    g = tl.where(merged <= 0, 0.0, _load(grad, at, inside, ACC))
    cell = partial + 2 * tl.program_id(0).to(tl.int64)
    tl.store(cell, tl.sum(g * f, axis=0))
    tl.store(cell + 1, tl.sum(g * s, axis=0))


@triton.jit
def _gradients(
    grad_residual,
    grad_shortcut,
    grad,
    y,
    weight,
    share,
    size,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, offset, inside = _elements(size, BLOCK)
    at = image * size + offset
    share += 2 * image * channels + (offset % channels if CHANNELS_LAST else offset // pixels)
    g = tl.where(_load(y, at, inside, ACC) <= 0, 0.0, _load(grad, at, inside, ACC))
    g_residual = tl.load(weight + 2 * image).to(ACC) * g + _load(share, 0, inside, ACC)
    g_shortcut = tl.load(weight + 2 * image + 1).to(ACC) * g + _load(share, channels, inside, ACC)
    tl.store(grad_residual + at, g_residual, mask=inside)
    tl.store(grad_shortcut + at, g_shortcut, mask=inside)


@triton.jit
def _skip_gradients(
    grad_residual, grad_shortcut, partial, grad, y, shortcut, weight, size, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    image, offset, inside = _elements(size, BLOCK)
    at = image * size + offset
    g = tl.where(_load(y, at, inside, ACC) <= 0, 0.0, _load(grad, at, inside, ACC))
    tl.store(grad_residual + at, g, mask=inside)
    tl.store(grad_shortcut + at, tl.load(weight).to(ACC) * g, mask=inside)
    dot = tl.sum(g * _load(shortcut, at, inside, ACC), axis=0)
    tl.store(partial + tl.program_id(0), dot)


def _arranged(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`grad` with its elements in the order of `like`."""
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def _blocks(x: torch.Tensor) -> tuple[int, int]:
    """Images, and blocks of each."""
    return len(x), triton.cdiv(x[0].numel(), BLOCK)


def _grid(x: torch.Tensor) -> tuple[int]:
    """The blocks of all images on one axis, the first, as CUDA takes no more than 65535 on any other."""
    return (math.prod(_blocks(x)),)


def _precision(x: torch.Tensor) -> tuple[tl.dtype, torch.dtype]:
    """In which to sum over `x`, by Triton's name and by torch's."""
    return (tl.float64, torch.float64) if x.dtype == torch.float64 else (tl.float32, torch.float32)


def _launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any) -> None:
    """Run `kernel` on the device of its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **OPTIONS)


def _note_write(x: torch.Tensor) -> None:
    """Have autograd refuse what was saved of `x` before a kernel wrote to it, as with torch's own operations."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def skip_relu(residual: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`relu(residual + w * shortcut)` of a scalar `w`, over `residual`."""
    y = residual.detach()
    _launch(_skip_relu, _grid(y), y, residual, shortcut, weight, y[0].numel(), _precision(y)[0], BLOCK)
    _note_write(y)
    return y


def mapping_relu(
    residual: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor, overwrite: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`relu(w1 * residual + w2 * shortcut)` of weights (N, 2), and its channel means (N, C) from the same pass."""
    y = residual.detach() if overwrite else torch.empty_like(residual)
    count, channels, pixels = *y.shape[:2], y.shape[2:].numel()
    acc, dtype = _precision(y)
    columns = triton.cdiv(pixels, SIDE)
    grid = count * columns, triton.cdiv(channels, SIDE)
    partial = torch.empty(count, columns, channels, dtype=dtype, device=y.device)
    channels_last = layout_of(y) == torch.channels_last
    tensors = y, partial, residual, shortcut, weight.contiguous()
    _launch(_mapping_relu, grid, *tensors, channels, pixels, channels_last, acc, SIDE)
    if overwrite:
        _note_write(y)
    return y, (partial.sum(1) / pixels).to(y.dtype)


def dots(grad: torch.Tensor, residual: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of `weight`, (N, 2): `sum(g * residual)` and `sum(g * shortcut)` with `g` from before the ReLU."""
    grad = _arranged(grad, residual)
    acc, dtype = _precision(grad)
    partial = torch.empty(*_blocks(grad), 2, dtype=dtype, device=grad.device)
    tensors = partial, grad, residual, shortcut, weight.contiguous()
    _launch(_dots, _grid(grad), *tensors, grad[0].numel(), acc, BLOCK)
    return partial.sum(1).to(weight.dtype)


def gradients(
    grad: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, share: Optional[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both maps: the merge's, and each channel's `share`, (N, 2C), that its mean gives every pixel."""
    grad = _arranged(grad, y)
    outputs = torch.empty_like(y), torch.empty_like(y)
    channels, pixels = y.shape[1], y.shape[2:].numel()
    if share is None:
        share = y.new_zeros(len(y), 2 * channels)
    tensors = *outputs, grad, y, weight.contiguous(), share.contiguous()
    channels_last = layout_of(y) == torch.channels_last
    _launch(_gradients, _grid(y), *tensors, channels * pixels, channels, pixels, channels_last, _precision(y)[0], BLOCK)
    return outputs


def skip_gradients(
    grad: torch.Tensor, y: torch.Tensor, shortcut: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of both maps and of the scalar `weight`."""
    grad = _arranged(grad, y)
    grad_residual, grad_shortcut = torch.empty_like(y), torch.empty_like(y)
    acc, dtype = _precision(y)
    partial = torch.empty(_blocks(y), dtype=dtype, device=y.device)
    tensors = grad_residual, grad_shortcut, partial, grad, y, shortcut, weight
    _launch(_skip_gradients, _grid(y), *tensors, y[0].numel(), acc, BLOCK)
    return grad_residual, grad_shortcut, partial.sum().to(weight.dtype)
