"""Arithmetic on adapters as arrays: scale one, add several, compress a LoRA or a full fine-tuning to MELoRA.

    scale     ΔW → c·ΔW
    add       Σ_j w_j·ΔW_j, exact by setting the latents side by side, or the nearest of a wanted rank
    compress  the nearest MELoRA of n and r: block k of ΔW → its best rank-r approximation (Eckart-Young), as
              ‖ΔW - blockdiag(M_1 ... M_n)‖² = ‖ΔW off the blocks‖² + Σ_k ‖ΔW_kk - M_k‖²

Everything is computed in float64 and stored in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors, config_of_sites
from melora_jax.checkpoints.factors import as_plain, plain_factors
from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.core.report import table
from melora_jax.core.spectrum import svd_of_product
from melora_jax.validation import check_count, check_sizes


@dataclasses.dataclass(frozen=True)
class Loss:
    """The error of an approximation of one site's ΔW, as squared Frobenius norms.

    Attributes:
      energy: ‖ΔW‖².
      off_blocks: the part outside the diagonal blocks, which minis can't represent.
      inside: the part inside the blocks that exceeds the requested rank.
    """

    energy: float
    off_blocks: float
    inside: float

    @property
    def error(self) -> float:
        """‖ΔW - its approximation‖ / ‖ΔW‖, 0 for an update that is zero."""
        return float(np.sqrt((self.off_blocks + self.inside) / self.energy)) if self.energy else 0.0


@dataclasses.dataclass(frozen=True)
class Approximation:
    """An adapter that approximates updates, and its errors. Prints as a table.

    Attributes:
      tree: the adapter.
      losses: by site path.
      left_out: names of parameters that changed and that the adapter has no place for, with ‖change‖².
    """

    tree: AdapterTree
    losses: Mapping[str, Loss]
    left_out: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("site", "off blocks", "inside", "error")]
        for path, loss in self.losses.items():
            shares = [part / loss.energy if loss.energy else 0.0 for part in (loss.off_blocks, loss.inside)]
            rows.append((path, f"{shares[0]:.2%}", f"{shares[1]:.2%}", f"{loss.error:.4f}"))
        lines = [table(rows)]
        lines += [f"left out: {name} (norm of its change {change**0.5:.4g})" for name, change in self.left_out.items()]
        return "\n".join(lines)


def scale(tree: AdapterTree, factor: float) -> AdapterTree:
    """The adapter with every ΔW multiplied by `factor`; settings and saved modules do not change.

    Raises:
      ValueError: `factor` is not finite.
    """
    if not np.isfinite(factor):
        raise ValueError(f"factor={factor} is not finite; choose a number such as 0.5 or -1")
    tree = _linear(tree)
    sites = {path: dataclasses.replace(site, b=site.b * np.float32(factor)) for path, site in tree.sites.items()}
    return dataclasses.replace(tree, sites=sites)


def add(
    trees: Sequence[AdapterTree], weights: Sequence[float] | None = None, *, rank: int | None = None
) -> Approximation:
    """Σ_j w_j·ΔW_j as one adapter.

    Without `rank` the sum is exact: if all adapters of a site have the same n and mixer `identity`, mini k has the
    latents of every mini k; otherwise the site has n=1 and all latents. With `rank`, each block keeps its largest
    singular values, so that a site has at most `rank` latents; the result's `losses` has the errors.

    Args:
      trees: adapters of one base; a site that one of them lacks counts as zero.
      weights: one per tree; None means 1 each.
      rank: the number of latents of a site, divided evenly among its minis; None keeps all.

    Raises:
      ValueError: there are no trees, weights and trees differ in number, sites differ in size, saved modules differ, or
        n does not divide the rank.
    """
    weights = [1.0] * len(trees) if weights is None else weights
    if not trees or len(weights) != len(trees) or not np.isfinite(weights).all():
        raise ValueError(f"{len(trees)} adapters and the weights {list(weights)}; give one finite weight for each")
    _require_equal_saved(trees)
    trees = [_linear(tree) for tree in trees]
    paths = dict.fromkeys(path for tree in trees for path in tree.sites)
    sites, losses = {}, {}
    for path in paths:
        parts = [(weight, tree.sites[path]) for weight, tree in zip(weights, trees, strict=True) if path in tree.sites]
        n, blocks = _summed(path, parts)
        r = _shared_rank(rank, n, path) if rank is not None else None
        sites[path], losses[path] = _site_of_blocks(blocks, r, parts[0][1].lookup)
    config = _config_like(trees[0], sites)
    return Approximation(dataclasses.replace(trees[0], config=config, sites=sites), losses)


def _config_like(tree: AdapterTree, sites: Mapping[str, SiteFactors]) -> MELoRAConfig:
    """The config of these sites, with what `tree` trains beside its own."""
    if tree.config.train_base:
        raise ValueError("train_base: a full fine-tuning has no adapters to compute with; take its checkpoint instead")
    specs = {path: site.spec for path, site in sites.items()}
    return config_of_sites(specs, tree.config.modules_to_save, tree.config.bias)


def _require_equal_saved(trees: Sequence[AdapterTree]) -> None:
    first = trees[0].saved
    for tree in trees[1:]:
        for path in sorted(first.keys() | tree.saved.keys()):
            if path not in first or path not in tree.saved or not np.array_equal(first[path], tree.saved[path]):
                raise ValueError(
                    f"{path} was trained whole and differs between the adapters, and heads do not add; give trees with "
                    "the same saved modules: dataclasses.replace(tree, saved=other.saved, config=...)"
                )


_Factors = tuple[np.ndarray, np.ndarray]


def _summed(path: str, parts: Sequence[tuple[float, SiteFactors]]) -> tuple[int, list[_Factors]]:
    """n, and the factors of each block, of a weighted sum."""
    if len({(site.d_in, site.d_out, site.lookup) for _, site in parts}) > 1:
        sizes = [f"{site.d_in} x {site.d_out}" for _, site in parts]
        raise ValueError(f"{path} is {' and '.join(sizes)} in these adapters; add adapters of one base")
    counts = {site.spec.n if site.spec.mixer == "identity" else 1 for _, site in parts}
    n = counts.pop() if len(counts) == 1 else 1
    split = [[(left * weight, right) for left, right in _blocks(*_exact(site), n)] for weight, site in parts]
    return n, [
        (np.concatenate([left for left, _ in block], 1), np.concatenate([right for _, right in block]))
        for block in zip(*split, strict=True)
    ]


def _linear(tree: AdapterTree) -> AdapterTree:
    """The adapter in plain factors: what AdaLoRA and PiSSA compute."""
    return as_plain(tree, "arithmetic on adapters adds plain updates")


def _exact(site: SiteFactors) -> _Factors:
    left, right = plain_factors(site)
    return left.astype(np.float64), right.astype(np.float64)


def _blocks(left: np.ndarray, right: np.ndarray, n: int) -> list[_Factors]:
    """The factors of each of n diagonal blocks, less the latents that do not reach it."""
    parts = zip(np.split(left, n), np.split(right, n, axis=1), strict=True)
    reached = [(rows.any(0) | columns.any(1), rows, columns) for rows, columns in parts]
    return [(rows[:, used], columns[used]) for used, rows, columns in reached]


def _shared_rank(rank: int, n: int, path: str) -> int:
    if rank < 1 or rank % n:
        raise ValueError(f"rank={rank} can't be shared by the {n} minis of {path}; choose a multiple of {n}")
    return rank // n


def _site_of_blocks(blocks: Sequence[_Factors], r: int | None, lookup: bool) -> tuple[SiteFactors, Loss]:
    """A site with one mini per block, exact or of rank at most r, and the error."""
    energy = sum(_energy(left, right) for left, right in blocks)
    kept = [_truncated(left, right, r) if r is not None else (left, right, 0.0) for left, right in blocks]
    site = _stacked([(left, right) for left, right, _ in kept], lookup)
    return site, Loss(energy, 0.0, sum(lost for _, _, lost in kept))


def _energy(left: np.ndarray, right: np.ndarray) -> float:
    """‖left · right‖², without forming the product."""
    return float(np.sum((left.T @ left) * (right @ right.T)))


def _truncated(left: np.ndarray, right: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best factors of rank r of left · right, their singular values shared evenly, and the energy left out."""
    return _largest(*svd_of_product(left, right), r)


def _largest(u: np.ndarray, values: np.ndarray, vt: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray, float]:
    """As `_truncated`, from the singular value decomposition."""
    root = np.sqrt(values[:r])
    return u[:, :r] * root, root[:, None] * vt[:r], float(np.sum(values[r:] ** 2))


def _stacked(blocks: Sequence[_Factors], lookup: bool) -> SiteFactors:
    """Minis of scale 1 with these factors; one without latents gets one of zeros."""
    r = tuple(max(left.shape[1], 1) for left, _ in blocks)
    a = [np.pad(left, ((0, 0), (0, max(r) - left.shape[1]))) for left, _ in blocks]
    b = [np.pad(right, ((0, max(r) - len(right)), (0, 0))) for _, right in blocks]
    spec = AdapterSpec(n=len(r), r=r, alpha=tuple(map(float, r)))
    return SiteFactors(spec, np.stack(a).astype(np.float32), np.stack(b).astype(np.float32), lookup)


def compress(tree: AdapterTree, *, n: int, r: int) -> Approximation:
    """The MELoRA of n minis of rank r nearest to an adapter, in the Frobenius norm of each site's ΔW.

    Args:
      tree: an adapter of any n and mixer, such as a LoRA.
      n: minis a layer; it must divide both sizes of each.
      r: rank of one mini.

    Raises:
      ValueError: n does not divide a size, or n or r is below 1.
    """
    tree = _linear(tree)
    sites, losses = {}, {}
    for path, site in tree.sites.items():
        _require_divisible(path, site.d_in, site.d_out, n, r)
        left, right = _exact(site)
        sites[path], inside = _site_of_blocks(_blocks(left, right, n), r, site.lookup)
        energy = _energy(left, right)
        losses[path] = Loss(energy, max(energy - inside.energy, 0.0), inside.inside)
    config = _config_like(tree, sites)
    return Approximation(dataclasses.replace(tree, config=config, sites=sites), losses)


def compress_deltas(deltas: Iterable[tuple[str, np.ndarray]], *, n: int, r: int) -> Approximation:
    """The MELoRA of n minis of rank r nearest to full updates, such as what a full fine-tuning changed.

    Args:
      deltas: (site path, ΔW [d_in, d_out]); consumed one at a time, so that they need not be in memory together.
      n: minis a layer; it must divide both sizes of each.
      r: rank of one mini.

    Raises:
      ValueError: no updates, n does not divide a size, or n or r is below 1.
    """
    sites, losses = {}, {}
    for path, delta in deltas:
        d_in, d_out = delta.shape
        _require_divisible(path, d_in, d_out, n, r)
        exact = delta.astype(np.float64)
        whole = exact.reshape(n, d_in // n, n, d_out // n)
        svds = [np.linalg.svd(whole[k, :, k], full_matrices=False) for k in range(n)]
        kept = [_largest(*svd, r) for svd in svds]
        sites[path] = _stacked([(left, right) for left, right, _ in kept], lookup=False)
        energy, held = float(np.sum(exact**2)), float(sum(np.sum(values**2) for _, values, _ in svds))
        losses[path] = Loss(energy, max(energy - held, 0.0), sum(lost for _, _, lost in kept))
    if not sites:
        raise ValueError("there is no update to compress; give (path, ΔW) of one layer at least")
    config = config_of_sites({path: site.spec for path, site in sites.items()})
    return Approximation(AdapterTree(config, sites, {}), losses)


def _require_divisible(path: str, d_in: int, d_out: int, n: int, r: int) -> None:
    check_count("n", n)
    check_count("r", r)
    check_sizes(d_in, d_out, n, path)
