"""MELoRA, LoRA, GraLoRA and AdamW in NumPy float64, from their equations. It imports nothing of ours.

Mini k has factors a_k [i r_k] and b_k [r_k o], unpadded; n minis make lists of n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Factors = Sequence[np.ndarray]


def generic_factors(seed: int, d_in: int, d_out: int, r: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Factors of standard normal entries, n = len(r)."""
    rng, n = np.random.default_rng(seed), len(r)
    a = [rng.normal(size=(d_in // n, rank)).astype(np.float32) for rank in r]
    b = [rng.normal(size=(rank, d_out // n)).astype(np.float32) for rank in r]
    return a, b


def padded(a: Factors, b: Factors) -> tuple[np.ndarray, np.ndarray]:
    """The factors stacked as [n i r] and [n r o], the narrower ones filled with entries that must not matter."""
    widest = max(block.shape[1] for block in a)
    stacked_a = [np.pad(block, ((0, 0), (0, widest - block.shape[1])), constant_values=5.0) for block in a]
    stacked_b = [np.pad(block, ((0, widest - block.shape[0]), (0, 0)), constant_values=7.0) for block in b]
    return np.stack(stacked_a), np.stack(stacked_b)


def scales(r: Sequence[int], alpha: Sequence[float], scaling: str) -> list[float]:
    """s_k of each mini: alpha_k over r_k ("mini"), Σ r_k ("total") or its square root ("rslora")."""
    if scaling == "mini":
        return [numerator / rank for numerator, rank in zip(alpha, r, strict=True)]
    total = sum(r)
    return [numerator / (total if scaling == "total" else total**0.5) for numerator in alpha]


def block_diagonal(blocks: Factors) -> np.ndarray:
    """The blocks along the diagonal of a matrix of zeros."""
    whole = np.zeros((sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)))
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole


def mixer_matrix(mixer: str, r: Sequence[int]) -> np.ndarray:
    """M, from latents to latents, [R R]."""
    n, total = len(r), sum(r)
    if mixer == "identity":
        return np.eye(total)
    if mixer == "all":
        return np.kron(np.ones((n, n)), np.eye(r[0]))
    matrix, chunk = np.zeros((total, total)), r[0] // n
    for block in range(n):
        for j in range(n):
            for entry in range(chunk):
                matrix[block * r[0] + j * chunk + entry, j * r[0] + block * chunk + entry] = 1.0
    return matrix


def delta(a: Factors, b: Factors, s: Sequence[float], mixer: str = "identity") -> np.ndarray:
    """ΔW = Â · diag(s) · M · B̂, [d_in d_out]."""
    r = [block.shape[1] for block in a]
    return block_diagonal(a) @ np.diag(np.repeat(s, r)) @ mixer_matrix(mixer, r) @ block_diagonal(b)


def melora(x: np.ndarray, a: Factors, b: Factors, s: Sequence[float]) -> np.ndarray:
    """concat_k( s_k · x_k A_k B_k ), a mini at a time."""
    slices = np.split(np.asarray(x, np.float64), len(a), axis=-1)
    parts = [scale * x_k @ a_k @ b_k for scale, x_k, a_k, b_k in zip(s, slices, a, b, strict=True)]
    return np.concatenate(parts, axis=-1)


def lora(x: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """scale · x A B with A [d_in r] and B [r d_out]."""
    return scale * np.asarray(x, np.float64) @ a @ b


def gralora_delta(a: Factors, b: Factors, scale: float) -> np.ndarray:
    """GraLoRA's ΔW: k·k independent low-rank blocks, of which A_j and B_i each hold a column and a row of k pieces.

    The block from input slice j to output slice i is the product of piece i of A_j and piece j of B_i.
    """
    k, chunk = len(a), a[0].shape[1] // len(a)
    rows = []
    for j in range(k):
        pieces = [slice(i * chunk, (i + 1) * chunk) for i in range(k)]
        rows.append([a[j][:, pieces[i]].astype(np.float64) @ b[i][pieces[j]] for i in range(k)])
    return scale * np.block(rows)


def adamw(
    parameters: np.ndarray,
    gradients: Sequence[np.ndarray],
    rate: float,
    *,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> np.ndarray:
    """The parameters after one step of AdamW (decoupled decay) a gradient."""
    w = np.asarray(parameters, np.float64)
    mean, square = np.zeros_like(w), np.zeros_like(w)
    for step, gradient in enumerate(gradients, 1):
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
        adam = mean / (1 - b1**step) / (np.sqrt(square / (1 - b2**step)) + eps)
        w = w - rate * (adam + weight_decay * w)
    return w
