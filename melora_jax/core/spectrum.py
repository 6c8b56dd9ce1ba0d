"""Rank and singular values of an update ΔW that is given by its factors.

ΔW [d_in, d_out] is never formed: its non-zero singular values are those of a core matrix no larger than R x R,
so the spectrum of a 4096 x 4096 update of rank 64 costs two thin QR factorisations and one 64 x 64 SVD.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FLOAT32_RANK_TOLERANCE = 1e-6
"""Relative size below which a singular value counts as rounding of float32 factors: 2⁻²³ is 1.2e-7, times 8."""


def singular_values(left: npt.ArrayLike, right: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The singular values of ΔW = left · right, largest first.

    Args:
      left: [d_in, R], any floating dtype; computed in float64.
      right: [R, d_out], likewise.

    Returns:
      float64 [min(d_in, R, d_out)]. ΔW's other singular values, up to min(d_in, d_out), are zero.

    Raises:
      ValueError: where the shapes do not multiply, or an entry is not finite.

    >>> import numpy as np
    >>> singular_values(np.diag([3.0, 4.0, 0.0]), np.eye(3, 5)).round(6).tolist()
    [4.0, 3.0, 0.0]
    """
    left, right = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(
            f"left has shape {list(left.shape)} and right {list(right.shape)}; the factors of one update "
            "are left [d_in, R] and right [R, d_out]"
        )
    for name, factor in (("left", left), ("right", right)):
        if not np.isfinite(factor).all():
            raise ValueError(f"{name} has entries that are not finite; the training that produced it diverged")
    return svd_of_product(left, right)[1]


def svd_of_product(
    left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The singular value decomposition of ΔW = left · right, which is never formed.

    left = Q₁T₁ and rightᵀ = Q₂T₂ (QR) give ΔW = Q₁(T₁T₂ᵀ)Q₂ᵀ, so that of the core T₁T₂ᵀ is turned by Q₁ and Q₂.

    Args:
      left: float64 [d_in, R].
      right: float64 [R, d_out].

    Returns:
      u [d_in, k], the singular values [k], largest first, and vᵀ [k, d_out], for k = min(d_in, R, d_out).

    >>> import numpy as np
    >>> u, values, vt = svd_of_product(np.diag([3.0, 4.0, 0.0]), np.eye(3, 5))
    >>> np.allclose(u * values @ vt, np.diag([3.0, 4.0, 0.0]) @ np.eye(3, 5))
    True
    """
    q1, t1 = np.linalg.qr(left)
    q2, t2 = np.linalg.qr(right.T)
    u, values, vt = np.linalg.svd(t1 @ t2.T, full_matrices=False)
    return q1 @ u, values, vt @ q2.T


def numerical_rank(values: npt.ArrayLike, rtol: float = FLOAT32_RANK_TOLERANCE) -> int:
    """How many singular values exceed `rtol` times the largest: #{j : σ_j > rtol · σ_max}.

    Args:
      values: singular values [k] in any order.
      rtol: relative tolerance in [0, 1). The default suits factors trained in float32: rounding their entries
        moves each σ_j by a few times 1e-7 · σ_max, and a direction that training has moved lies far above.
        It is coarser than `numpy.linalg.matrix_rank`, whose tolerance suits float64 matrices.

    Raises:
      ValueError: where a value is negative or not finite, or `rtol` is outside [0, 1).

    >>> numerical_rank([4.0, 3.0, 1e-9])
    2
    """
    if not 0.0 <= rtol < 1.0:
        raise ValueError(f"rtol={rtol} is outside [0, 1); choose e.g. {FLOAT32_RANK_TOLERANCE} for float32 factors")
    values = _checked(values)
    return int(np.count_nonzero(values > rtol * values.max(initial=0.0)))


def effective_rank(values: npt.ArrayLike) -> float:
    """The effective rank exp(-Σ p_j ln p_j) with p_j = σ_j / Σσ: k for k equal values, near 1 where one dominates.

    Args:
      values: singular values [k] in any order; zeros contribute nothing.

    Returns:
      A number in [1, k], or 0.0 for an update that is all zero.

    Raises:
      ValueError: where a value is negative or not finite.

    Source: Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    >>> round(effective_rank([2.0, 2.0, 2.0, 0.0]), 6)
    3.0
    """
    values = _checked(values)
    largest = values.max(initial=0.0)
    if largest == 0.0:
        return 0.0
    scaled = values / largest  # first, so that neither a tiny nor a huge update leaves float64's range
    shares = scaled / scaled.sum()
    shares = shares[shares > 0.0]
    return math.exp(-float(np.sum(shares * np.log(shares))))


def _checked(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """`values` as float64 [k], finite and not negative."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values has shape {list(values.shape)}; singular values are one list [k]")
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0.0)))
    if wrong.size:
        raise ValueError(f"values[{wrong[0]}] is {values[wrong[0]]}; singular values are finite and not negative")
    return values
