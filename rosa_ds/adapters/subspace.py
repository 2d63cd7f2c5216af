"""The re-drawn low-rank part (ROSA): fold it into the base, choose new directions, split those off again.

Everything here is local mathematics on whole float32 matrices; how ranks share the work is
:mod:`rosa_ds.methods.subspace`'s. With orthonormal directions ``U`` (N, R) of the weight ``W`` the new factors are
``B = U``, ``A = Uᵀ W``, and the base becomes ``W − B A``: the sum is W again however rough the factorisation was.

Source: ROSA, arXiv 2407.07802.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from rosa_ds.adapters.low_rank import float32_products
from rosa_ds.config.schema import Directions, DrawSettings, Factorization

logger = logging.getLogger(__name__)
ORTHONORMAL = 1e-4
"""Largest deviation of a basis' Gram matrix from the identity; float32 ``eigh`` leaves about 1e-6."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a draw makes of one weight: factors ``A`` (R, M), ``B`` (N, R), and ``rest`` (N, M), the new base.

    ``fallbacks``: factorisations that failed before the one that was used.
    """

    A: Tensor
    B: Tensor
    rest: Tensor
    fallbacks: int

    @float32_products()
    def error(self, stored: Tensor, weight: Tensor) -> float:
        """What the function loses: ``stored + B A`` against the ``weight`` (N, M) that was drawn, relative."""
        difference = torch.addmm(stored.to(weight.dtype), self.B, self.A).sub_(weight)
        size = weight.norm()
        return float(difference.norm() / size) if size else float(difference.norm())


@float32_products()
def split_off(
    weight: Tensor, rank: int, settings: DrawSettings, generator: torch.Generator, dtype: torch.dtype
) -> Drawn:
    """Split a low-rank part off a weight.

    Args:
        weight: (N, M), float32 or float64; not changed.
        generator: on the CPU; decides ``random``, ``window`` and ``projection``.
        dtype: what the model computes in. The factors are numbers of this type, so that the base makes up for rounding them.

    Raises: ValueError as :func:`singular_directions`.
    """
    fallbacks, (rows, columns) = 0, weight.shape
    if settings.directions == "projection":
        basis = random_directions(columns, rank, generator).to(weight)
        A, B = basis.mT, weight @ basis
    else:
        indices = choose(settings.directions, min(rows, columns), rank, generator)
        basis, fallbacks = singular_directions(weight, indices, settings.factorization)
        A, B = (basis.mT @ weight, basis) if rows <= columns else (basis.mT, weight @ basis)
    A, B = (factor.to(dtype).to(weight.dtype).contiguous() for factor in _balance(A, B, settings.sigma))
    return Drawn(A, B, torch.addmm(weight, B, A, alpha=-1), fallbacks)


def choose(directions: Directions, count: int, rank: int, generator: torch.Generator) -> Tensor:
    """Which singular directions to train, 0 being that of the largest singular value. Shapes: result (rank,), sorted.

    ``random`` is a uniformly drawn subset, ``window`` a uniformly drawn run of neighbours, ends included.
    """
    if directions == "random":
        return torch.randperm(count, generator=generator)[:rank].sort().values
    first = {"top": 0, "bottom": count - rank}.get(directions)
    if first is None:
        first = int(torch.randint(0, count - rank + 1, (1,), generator=generator))
    return torch.arange(first, first + rank)


def random_directions(features: int, rank: int, generator: torch.Generator) -> Tensor:
    """A random orthonormal basis. Shapes: result (features, rank), float32, on the CPU."""
    return torch.linalg.qr(torch.randn(features, rank, generator=generator))[0]


def singular_directions(weight: Tensor, indices: Tensor, method: Factorization) -> tuple[Tensor, int]:
    """Chosen singular vectors of the shorter side of a weight, checked, and how many attempts failed before.

    Shapes: weight (N, M) float32 or float64, result (min(N, M), R) of its dtype.
    Raises: ValueError if no way of factorising gives orthonormal vectors, as with numbers that are not finite.
    """
    failed: list[str] = []
    for how, dtype, device in _solvers(weight, method):
        try:
            basis = _factorise(weight.to(device, dtype), indices.to(device), how)
            problem = None if (defect := _defect(basis)) <= ORTHONORMAL else f"vectors {defect:.1e} off orthonormal"
        except RuntimeError as error:  # LinAlgError, and what cuSOLVER raises for other reasons
            problem = str(error).splitlines()[0]
        if problem is None:
            return basis.to(weight.device, weight.dtype), len(failed)
        failed.append(f"{how} in {str(dtype).removeprefix('torch.')} on {device.type}: {problem}")
        logger.warning("factorisation %s", failed[-1])
    raise ValueError(f"a weight of {tuple(weight.shape)} cannot be factorised ({'; '.join(failed)})")


def _factorise(weight: Tensor, indices: Tensor, method: Factorization) -> Tensor:
    """Singular vectors of the shorter side, as columns, largest singular value first. Shapes: result (min(N, M), R)."""
    rows, columns = weight.shape
    if method == "svd":
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        return (U if rows <= columns else Vh.mT)[:, indices]
    gram = weight @ weight.mT if rows <= columns else weight.mT @ weight
    _, vectors = torch.linalg.eigh(gram)
    return vectors[:, gram.shape[0] - 1 - indices]  # eigh sorts upwards


def _solvers(weight: Tensor, method: Factorization) -> Iterator[tuple[Factorization, torch.dtype, torch.device]]:
    """What to try, one after another: the method as it is, in float64, in float64 on the CPU, and SVD there."""
    # an out-of-memory on the device goes this way, too: the CPU has more
    yield method, weight.dtype, weight.device
    yield method, torch.float64, weight.device
    if weight.device.type != "cpu":
        yield method, torch.float64, torch.device("cpu")
    if method != "svd":
        yield "svd", torch.float64, torch.device("cpu")


def _defect(basis: Tensor) -> float:
    """How far columns are from orthonormal; infinite for what is not finite."""
    deviation = (basis.mT @ basis - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)).abs().max()
    return float(deviation) if bool(torch.isfinite(deviation)) else float("inf")


def _balance(A: Tensor, B: Tensor, sigma: str) -> tuple[Tensor, Tensor]:
    """Give the length σ of each component of ``B A`` to ``A``, to ``B``, or to both alike; the product stays.

    A component without length stays where it is: divided by zero it would never be trained.
    """
    length_A, length_B = A.norm(dim=1), B.norm(dim=0)
    lengths = length_A * length_B
    wanted = {"A": lengths, "B": torch.ones_like(lengths), "even": lengths.sqrt()}[sigma]
    smallest = torch.finfo(A.dtype).eps * lengths.max()
    factor = torch.where(lengths > smallest, wanted / length_A.clamp_min(torch.finfo(A.dtype).tiny), 1.0)
    return A * factor[:, None], B / factor


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """The new directions in terms of the old ones, by least squares. Shapes: both (n, R) columns; result (R, R), float64.

    By the pseudo-inverse: least squares on a GPU would want old directions that are independent, which nobody promises.
    """
    return (torch.linalg.pinv(old.double()) @ new.double()).mT


def project_moments(first: Tensor, second: Tensor, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments of a factor after its directions were exchanged.

    A factor's gradient is the full gradient seen along the other factor's directions, so it follows them linearly. Second
    moments follow as those of independent numbers; what the old directions do not reach is given their mean.

    Shapes: first, second (R, n) of the factor; new, old (m, R), the other factor's directions as columns; results (R, n).
    """
    along = overlap(new, old)
    length_new, length_old = (x.double().square().sum(0) for x in (new, old))
    reached = (old.double() @ along.mT).square().sum(0)
    missing = (length_new - reached).clamp_min(0)
    mean = (second.double() / length_old[:, None].clamp_min(torch.finfo(torch.float64).tiny)).mean(0)
    moved = along.square() @ second.double() + missing[:, None] * mean
    return (along @ first.double()).to(first.dtype), moved.to(second.dtype)


def split_bits(whole: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 number as the nearest bfloat16 and the rest of its bits: together they are the same 32 bits again.

    Shapes: any; results bfloat16 and int16. Finite numbers that no bfloat16 is near to are not given.
    """
    bits = whole.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_bits(high: Tensor, low: Tensor | None) -> Tensor:
    """What :func:`split_bits` has split, float32; without ``low`` it is ``high`` itself. Shapes: alike."""
    if low is None:
        return high
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)
