"""Masks to measure with: random, of a gradient, or saved by a run; and how unequally they fill the matrix.

Speed depends on how unequal rows and columns are. Fine-tuning picks the largest gradients, which gather in few rows
and columns: a few channels of the residual stream are many times as large as the others, SwiGLU units are mostly near
zero, and few tokens carry most of the gradient. The network below has all three.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_bench.cases import Layer
from rosa_kernels.pattern.tiles import TILE, tile_plan
from rosa_kernels.testing import random_positions

# Chosen so that statistics close to those of a mask of SmolLM2-135M come out (density 0.6 %, text-to-SQL; means over 30
# blocks): up and gate 33 % empty rows, 14 % empty columns, 16 % of the sorted tiles in use; down 2 %, 83 %, 12 %; v 1 %,
# 96 %, 12 %. Its q, k and o, which have no network of their own here, fill 12 to 20 % with 42 to 79 % empty columns.
VOCABULARY = 1024
SEQUENCES, LENGTH = 8, 128
ZIPF = 0.7  # token frequency over rank; of the tokens of byte-pair vocabularies it is flatter than of words
OUTLIERS, OUTLIER_SIZE = 0.007, 8.0  # share of the channels that RMSNorm leaves larger, and how much larger
CHANNEL_SPREAD = 0.2  # standard deviation of the logarithm of the other channels' sizes
UNIT_SPREAD = 0.4  # the same of the SwiGLU units
OUTPUT_SPREAD = 0.1  # the same of the channels before the readout
COMMON = 0.2  # size of what all tokens share in the residual stream
ATTENTION_SPREAD = 2.0  # standard deviation of the attention scores


def uniform_mask(layer: Layer, density: float) -> Tensor:
    """Sorted int32 positions, all equally likely."""
    return random_positions(layer.rows, layer.columns, density)


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


class _Draw:
    """Random weights of one network, on one device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = device

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self.normal(rows, columns).mul_(columns**-0.5)

    def sizes(self, count: int, spread: float) -> Tensor:
        """Log-normal factors."""
        return (self.normal(count) * spread).exp()

    def tokens(self) -> Tensor:
        """(SEQUENCES, LENGTH + 1) ids, frequent ones first."""
        frequency = torch.arange(1, VOCABULARY + 1, device=self.device).float() ** -ZIPF
        ids = torch.multinomial(frequency, SEQUENCES * (LENGTH + 1), True, generator=self.generator)
        return ids.view(SEQUENCES, LENGTH + 1)


def _attend(draw: _Draw, v_TN: Tensor) -> Tensor:
    """Causal averages over each sequence with random scores."""
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=draw.device).triu(1)
    scores = draw.normal(SEQUENCES, LENGTH, LENGTH) * ATTENTION_SPREAD
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v_TN.view(SEQUENCES, LENGTH, -1)).flatten(0, 1)


def _block(draw: _Draw, layer: Layer, weight_NM: Tensor, x_TH: Tensor) -> Tensor:
    """What the layer's block adds to the residual stream of H features, from the normed stream ``x_TH``."""
    width = x_TH.shape[1]
    if layer.role == "attention":
        return _attend(draw, x_TH @ weight_NM.T) @ draw.weight(width, layer.rows).T
    units = layer.columns if layer.role == "narrowing" else layer.rows
    sizes_U = draw.sizes(units, UNIT_SPREAD)[:, None]
    active = F.silu(x_TH @ (draw.weight(units, width) * sizes_U).T)
    if layer.role == "narrowing":
        return (active * (x_TH @ (draw.weight(units, width) * sizes_U).T)) @ weight_NM.T
    return (active * (x_TH @ weight_NM.T)) @ draw.weight(width, units).T


def weight_gradient(layer: Layer, device: torch.device, seed: int = 0) -> Tensor:
    """Gradient (N, M) of the layer's weight in a random network of one block, by backpropagation of its cross entropy."""
    draw = _Draw(seed, device)
    width = layer.rows if layer.role == "narrowing" else layer.columns
    ids = draw.tokens()
    embedding = draw.normal(VOCABULARY, width)
    stream = embedding[ids[:, :-1].flatten()] + draw.normal(width) * COMMON
    channels = draw.sizes(width, CHANNEL_SPREAD)
    channels[: max(1, round(OUTLIERS * width))] *= OUTLIER_SIZE
    weight = draw.weight(layer.rows, layer.columns).requires_grad_()
    stream = stream + _block(draw, layer, weight, _rms_norm(stream, channels))
    logits = _rms_norm(stream, draw.sizes(width, OUTPUT_SPREAD)) @ embedding.T * width**-0.5
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, ids[:, 1:].flatten()), weight)
    return gradient


def gradient_mask(layer: Layer, density: float, device: torch.device) -> Tensor:
    """Sorted int32 positions of the entries of :func:`weight_gradient` with the largest squares."""
    squares = weight_gradient(layer, device).square_().flatten()
    count = max(1, round(squares.numel() * density))
    return squares.topk(count, sorted=False).indices.sort().values.to(torch.int32)


def saved_mask(file: str, weight: str, layer: Layer) -> Tensor:
    """Positions of one weight from a safetensors file of weight name -> sorted flat positions.

    Raises: ValueError for a name that is not there, or positions that are none of a matrix of this shape.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as masks:
        names = list(masks.keys())
        if weight not in names:
            near = difflib.get_close_matches(weight, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"{file} has no mask of {weight!r}; it has {len(names)}, among them {', '.join(near)}")
        positions = masks.get_tensor(weight)
    size = layer.rows * layer.columns
    if positions.ndim != 1 or positions.is_floating_point() or not positions.numel():
        raise ValueError(f"{weight} in {file} is {tuple(positions.shape)} of {positions.dtype}, not positions (Z,)")
    if int(positions[0]) < 0 or int(positions[-1]) >= size or not bool((positions.diff() > 0).all()):
        raise ValueError(
            f"{weight} in {file} has positions from {int(positions[0])} to {int(positions[-1])}, which are not sorted ones "
            f"of a {layer} matrix: give its shape with --shape"
        )
    return positions.to(torch.int32) if size <= 2**31 else positions


def tile_statistics(positions_Z: Tensor, layer: Layer, dtype: torch.dtype) -> dict[str, float]:
    """How unequally a mask fills its matrix, in percent.

    Keys: ``empty_rows, empty_columns``; of all 64 x 64 tiles ``tiles_given`` (holding entries, in the order of the
    matrix), ``tiles_sorted`` (the same with rows and columns sorted by count) and ``tiles_heavy`` (of those, with enough
    entries for tensor cores at this dtype); of the entries ``entries_outside`` (in no heavy tile).
    """
    rows, columns = layer.rows, layer.columns
    plan = tile_plan(positions_Z, rows, columns, dtype)
    across = -(-columns // TILE)
    total = -(-rows // TILE) * across
    position = positions_Z.long()
    given = (position // columns // TILE * across + position % columns // TILE).unique().numel()
    return {
        "empty_rows": 100 * (1 - int((plan.row_order >= 0).sum()) / rows),
        "empty_columns": 100 * (1 - int((plan.column_order >= 0).sum()) / columns),
        "tiles_given": 100 * given / total,
        "tiles_sorted": 100 * plan.tiles.shape[0] / total,
        "tiles_heavy": 100 * plan.heavy / total,
        "entries_outside": 100 * (1 - plan.heavy_entries / plan.entries),
    }
