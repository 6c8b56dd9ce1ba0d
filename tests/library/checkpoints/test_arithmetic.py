"""Adapters scaled, added and compressed, against NumPy on the full ΔW."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors, config_of_sites
from melora_jax.checkpoints.arithmetic import add, compress, compress_deltas, scale
from melora_jax.checkpoints.save_load import adapter_tree
from melora_jax.config import AdapterSpec
from tests.support import reference, tiny


def site(seed: int, d_in: int = 12, d_out: int = 18, **settings: Any) -> SiteFactors:
    spec = AdapterSpec(**({"n": 3, "r": (2, 1, 2), "alpha": (4.0, 5.0, 7.0)} | settings))
    a, b = reference.padded(*reference.generic_factors(seed, d_in, d_out, spec.r))
    return SiteFactors(spec, a, b)


def tree(saved: dict[str, np.ndarray] | None = None, **sites: SiteFactors) -> AdapterTree:
    head = sorted({path.split("/")[0] for path in saved or {}})
    return AdapterTree(config_of_sites({path: one.spec for path, one in sites.items()}, head), sites, saved or {})


def delta(one: SiteFactors) -> np.ndarray:
    """ΔW in float64 by the reference."""
    a = [block[:, :r] for block, r in zip(one.a, one.spec.r, strict=True)]
    b = [block[:r] for block, r in zip(one.b, one.spec.r, strict=True)]
    return reference.delta(a, b, one.spec.scales, one.spec.mixer)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * abs(expected).max())


def best(delta: np.ndarray, n: int, r: int) -> np.ndarray:
    """The nearest block-diagonal matrix with n blocks of rank r."""
    blocks = []
    for rows, k in zip(np.split(delta, n), range(n), strict=True):
        u, values, vt = np.linalg.svd(np.split(rows, n, axis=1)[k], full_matrices=False)
        blocks.append(u[:, :r] * values[:r] @ vt[:r])
    return reference.block_diagonal(blocks)


LIKE = {"n": 2, "r": (3, 3), "alpha": (2.0, 9.0)}
SITES = {
    "MELoRA": {},
    "LoRA": {"n": 1, "r": (4,), "alpha": (6.0,)},
    "shuffle": LIKE | {"r": (4, 4), "mixer": "shuffle"},
    "all": LIKE | {"mixer": "all"},
}


@pytest.mark.parametrize("factor", [0.25, -1.0, 0.0, 3.0])
def test_scale_scales_the_update_and_nothing_else(factor: float) -> None:
    before = tree({"head/bias": np.ones(3, np.float32)}, q=site(0))
    after = scale(before, factor)
    assert_close(delta(after.sites["q"]), factor * delta(before.sites["q"]))
    assert after.config == before.config
    assert after.saved is before.saved
    with pytest.raises(ValueError, match="factor=nan is not finite"):
        scale(before, float("nan"))


@pytest.mark.parametrize("second", SITES)
@pytest.mark.parametrize("first", SITES)
def test_a_sum_without_a_rank_is_exact(first: str, second: str) -> None:
    one, other = site(0, **SITES[first]), site(1, **SITES[second])
    found = add([tree(q=one), tree(q=other, k=other)], [0.5, -2.0])
    assert_close(delta(found.tree.sites["q"]), 0.5 * delta(one) - 2.0 * delta(other))
    assert_close(delta(found.tree.sites["k"]), -2.0 * delta(other))
    assert {loss.error for loss in found.losses.values()} == {0.0}
    same = first == second and first in ("MELoRA", "LoRA")
    assert found.tree.sites["q"].spec.n == (one.spec.n if same else 1)
    for path, entry in found.tree.sites.items():
        assert found.tree.config.spec(path) == entry.spec


def test_minis_added_to_minis_keep_their_number_and_add_their_ranks() -> None:
    found = add([tree(q=site(0)), tree(q=site(1))])
    assert found.tree.sites["q"].spec.r == (4, 2, 4)


def test_a_sum_of_a_wanted_rank_is_the_nearest_and_says_how_near() -> None:
    one, other = site(0), site(1)
    found = add([tree(q=one), tree(q=other)], [1.5, 1.0], rank=3)
    whole = 1.5 * delta(one) + delta(other)
    assert_close(delta(found.tree.sites["q"]), best(whole, 3, 1))
    error = np.linalg.norm(whole - best(whole, 3, 1)) / np.linalg.norm(whole)
    assert found.losses["q"].error == pytest.approx(error, rel=1e-6)
    assert found.losses["q"].off_blocks == 0.0


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize(("n", "r"), [(1, 2), (2, 1), (6, 1), (3, 2), (3, 9)])
def test_compress_finds_the_nearest_minis_and_what_they_leave_out(name: str, n: int, r: int) -> None:
    one = site(3, **SITES[name])
    whole, nearest = delta(one), best(delta(one), n, r)
    blocks = best(whole, n, 12)
    for found in (compress(tree(q=one), n=n, r=r), compress_deltas([("q", whole)], n=n, r=r)):
        assert_close(delta(found.tree.sites["q"]), nearest)
        loss = found.losses["q"]
        assert loss.energy == pytest.approx(np.sum(whole**2), rel=1e-6)
        assert loss.off_blocks == pytest.approx(np.sum((whole - blocks) ** 2), rel=1e-5, abs=1e-6 * loss.energy)
        assert loss.inside == pytest.approx(np.sum((blocks - nearest) ** 2), rel=1e-5, abs=1e-6 * loss.energy)
        assert loss.error == pytest.approx(np.linalg.norm(whole - nearest) / np.linalg.norm(whole), abs=2e-3)
        assert "q" in str(found)


def test_a_melora_compressed_to_itself_loses_nothing() -> None:
    model = tiny.trained(r=2)
    before = adapter_tree(model)
    found = compress(before, n=2, r=2)
    for path, entry in before.sites.items():
        assert_close(delta(found.tree.sites[path]), delta(entry))
        assert found.losses[path].error < 1e-6
    assert found.tree.saved is before.saved
    assert found.tree.config.modules_to_save == before.config.modules_to_save


def test_an_update_of_zero_is_compressed_to_zero() -> None:
    one = site(0)
    found = compress(tree(q=dataclasses.replace(one, b=0 * one.b)), n=2, r=1)
    assert not found.tree.sites["q"].b.any()
    assert found.losses["q"].error == 0.0


HEAD = {"head/bias": np.ones(3, np.float32)}
BAD: dict[str, tuple[Any, str]] = {
    "no adapters": (lambda: add([]), r"0 adapters and the weights \[\]; give one finite weight for each"),
    "a weight too few": (lambda: add([tree(q=site(0))] * 2, [1.0]), r"2 adapters and the weights \[1.0\]; give one fi"),
    "unlike sizes": (
        lambda: add([tree(q=site(0)), tree(q=site(0, d_in=6))]),
        "q is 12 x 18 and 6 x 18 in these adapters; add adapters of one base",
    ),
    "heads": (
        lambda: add([tree(HEAD, q=site(0)), tree({"head/bias": np.zeros(3, np.float32)}, q=site(0))]),
        "head/bias was trained whole and differs between the adapters, and heads do not add; give trees",
    ),
    "one head": (lambda: add([tree(q=site(0)), tree(HEAD, q=site(0))]), "head/bias was trained whole and differs"),
    "a rank": (lambda: add([tree(q=site(0))], rank=4), "rank=4 can't be shared by the 3 minis of q; choose a multiple"),
    "an n": (
        lambda: compress(tree(q=site(0)), n=4, r=1),
        "n=4 does not divide d_out=18 at q; choose n from 1, 2, 3",
    ),
    "no updates": (
        lambda: compress_deltas([], n=2, r=1),
        r"there is no update to compress; give \(path, ΔW\) of one lay",
    ),
    "no rank": (lambda: compress(tree(q=site(0)), n=2, r=0), "r=0 must be a whole number of at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_add_up_is_said(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
