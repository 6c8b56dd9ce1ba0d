"""adapt, merge and unwrap on a small encoder: what is matched, what is trained, and that a refusal changes nothing."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from tests.support import tiny

ALL = [f"layer/{k}/{name}" for k in (0, 1) for name in ("out", "query", "value")]
QUERIES, VALUES, OUTS = ([path for path in ALL if path.endswith(name)] for name in ("query", "value", "out"))


def sites(**changes: Any) -> list[str]:
    model = tiny.Encoder()
    return [site.path for site in mj.adapt(model, tiny.config(**changes), rngs=nnx.Rngs(0)).sites]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"targets": ["query"]}, QUERIES),
        ({"targets": ["query", "out"]}, sorted(QUERIES + OUTS)),
        ({"targets": ["0.query"]}, ["layer/0/query"]),
        ({"targets": ["layer/0/query"]}, ["layer/0/query"]),
        ({"targets": r"layer/\d/(query|value)"}, sorted(QUERIES + VALUES)),
        ({"targets": r"layer\.1\..*"}, ALL[3:]),
        ({"targets": "value"}, VALUES),
        ({"targets": ["embed"]}, ["embed"]),
        ({"targets": "all-linear"}, ALL),
        ({"targets": "all-linear", "modules_to_save": []}, ["classifier", *ALL]),
        ({"targets": "all-linear", "exclude": ["out", "1.query"]}, ["layer/0/query", *VALUES]),
        ({"targets": "all-linear", "exclude": r".*/0/.*"}, ALL[3:]),
        ({"targets": ["query", "value"], "layers": [1]}, ["layer/1/query", "layer/1/value"]),
        ({"targets": ()}, []),
    ],
)
def test_targets_exclude_and_layers_choose_the_sites(changes: dict[str, Any], expected: list[str]) -> None:
    if changes["targets"] == ["embed"] or changes.get("modules_to_save") == []:
        changes = changes | {"n": 1}  # vocabulary and labels are prime
    assert sites(**changes) == expected


def test_overrides_give_each_site_its_own_shape() -> None:
    adaptation = mj.adapt(
        tiny.Encoder(),
        tiny.config(
            r=[1, 2],
            n_pattern={"layer.1.query": 1},
            rank_pattern={r".*/1/query": 3, "value": 2},
            alpha_pattern={"layer/1/query": 6},
        ),
        rngs=nnx.Rngs(0),
    )
    shapes = {site.path: (site.n, site.r, site.rank, site.parameters) for site in adaptation.sites}
    assert shapes == {
        "layer/0/query": (2, (1, 2), 3, 3 * (3 + 5)),
        "layer/0/value": (2, (2, 2), 4, 4 * (3 + 5)),
        "layer/1/query": (1, (3,), 3, 3 * (6 + 10)),
        "layer/1/value": (2, (2, 2), 4, 4 * (3 + 5)),
    }


def test_the_report_counts_and_prints() -> None:
    model = tiny.Encoder()
    adaptation = mj.adapt(model, tiny.config(r=[1, 2], exclude=["1.value"], strategy="packed"), rngs=nnx.Rngs(0))
    assert str(adaptation) == (
        "site             d_in  d_out  n    r  rank  parameters  strategy\n"
        "layer/0,1/query     6     10  2  1,2     3      2 × 24  packed\n"
        "layer/0/value       6     10  2  1,2     3          24  packed\n"
        "trained whole: classifier\n"
        "adapters 72 + head 21 = 93 trainable (17.92 %), 478 frozen"
    ).replace("17.92", f"{100 * 93 / (93 + adaptation.frozen):.2f}").replace("478", str(adaptation.frozen))
    assert adaptation.frozen == 13 * 6 + 2 * (2 * (60 + 10) + 60)
    assert adaptation.to_dict()["trainable"] == adaptation.trainable == 93
    assert mj.describe(model) == adaptation


def test_only_factors_and_saved_modules_are_trained_and_saved_ones_in_float32() -> None:
    model = tiny.Encoder(dtype=jnp.bfloat16)
    mj.adapt(model, tiny.config(), rngs=nnx.Rngs(0))
    kinds = {path: (type(v), v.dtype) for path, v in flat(model)}
    for path, (kind, dtype) in kinds.items():
        if path.endswith(("/a", "/b")):
            assert (kind, dtype) == (mj.MELoRAParam, jnp.float32)
        elif path.startswith("classifier/"):
            assert (kind, dtype) == (nnx.Param, jnp.float32)
        else:
            assert (kind, dtype) == (mj.FrozenParam, jnp.bfloat16), path


def flat(model: nnx.Module) -> list[tuple[str, Any]]:
    return [("/".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(nnx.state(model))]


def test_a_head_alone_can_be_trained() -> None:
    model = tiny.Encoder()
    adaptation = mj.adapt(model, tiny.config(targets=()), rngs=nnx.Rngs(0))
    assert (adaptation.adapter, adaptation.head) == (0, 21)
    assert sorted(tiny.arrays(model, nnx.Param)) == ["classifier/bias", "classifier/kernel"]
    tiny.assert_equal(tiny.arrays(mj.unwrap(model)), tiny.arrays(tiny.Encoder()))


def test_start_values_do_not_depend_on_the_other_sites() -> None:
    few, many = tiny.Encoder(), tiny.Encoder()
    mj.adapt(few, tiny.config(targets=["1.value"]), rngs=nnx.Rngs(5))
    mj.adapt(many, tiny.config(targets="all-linear"), rngs=nnx.Rngs(5))
    np.testing.assert_array_equal(few.layer[1].value.a[...], many.layer[1].value.a[...])
    assert not np.array_equal(many.layer[1].value.a[...], many.layer[0].value.a[...])
    other = tiny.Encoder()
    mj.adapt(other, tiny.config(targets=["1.value"]), rngs=nnx.Rngs(6))
    assert not np.array_equal(few.layer[1].value.a[...], other.layer[1].value.a[...])


def test_adapting_changes_no_output_bit_and_unwrapping_restores_the_model() -> None:
    model = tiny.Encoder()
    before, y = tiny.snapshot(model), np.asarray(tiny.run(model, tiny.IDS))
    mj.adapt(model, tiny.config(r=2), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(tiny.run(model, tiny.IDS), y)
    tiny.stirred(model)
    moved = np.asarray(tiny.run(model, tiny.IDS))
    assert abs(moved - y).max() > 0.01
    adapted = tiny.snapshot(model)
    tiny.assert_as_before(mj.unwrap(model), before)
    merged = mj.merge(model)
    assert nnx.graphdef(merged) == before[0]
    np.testing.assert_allclose(tiny.run(merged, tiny.IDS), moved, rtol=1e-5, atol=1e-6)
    tiny.assert_as_before(model, adapted)


def test_merging_changes_the_adapted_kernels_alone_and_keeps_the_trained_head() -> None:
    model = tiny.adapted()
    model.classifier.bias[...] += 1.0
    merged, base = tiny.arrays(mj.merge(model)), tiny.arrays(tiny.Encoder())
    for path, value in base.items():
        if path.endswith(("query/kernel", "value/kernel")):
            assert not np.array_equal(merged[path], value), path
        elif path == "classifier/bias":
            np.testing.assert_array_equal(merged[path], value + 1.0)
        else:
            np.testing.assert_array_equal(merged[path], value, err_msg=path)


def test_a_merged_model_can_be_adapted_again() -> None:
    model = mj.merge(tiny.adapted())
    mj.adapt(model, tiny.config(n=1, r=3), rngs=nnx.Rngs(0))
    assert mj.describe(model).adapter == 4 * 3 * 16


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 7}, "n=7 does not divide d_in=6 at layer/0/query; choose n from 1, 2"),
    ({"n_pattern": {"1.value": 3}}, "n=3 does not divide d_out=10 at layer/1/value; choose n from 1, 2"),
    ({"targets": ["qery"]}, "targets: 'qery' matches no module; perhaps 'query'"),
    (
        {"targets": ["query", "zzz"]},
        "targets: 'zzz' matches no module; the names there are: embed, layer, out, query, value",
    ),
    ({"targets": r"layer/\d/qery"}, "targets='layer/\\\\d/qery' matches no module; perhaps 'query'"),
    ({"targets": ["classifier"]}, "targets: 'classifier' lies in modules_to_save, which is trained whole; take it out"),
    ({"targets": ["layer"]}, "layer can't be adapted: List has no dense kernel [d_in, d_out]; adaptable are Linear,"),
    ({"exclude": ["quary"]}, "exclude: 'quary' matches no module; perhaps 'query'"),
    ({"exclude": "embed"}, "exclude='embed' matches none of the targets; the names there are: query, value"),
    ({"exclude": ".*"}, "exclude and layers leave no target; loosen them, or name others in targets"),
    ({"layers": [1, 2]}, "layers=[2] hold no target; the targets lie in layers [0, 1]"),
    ({"rank_pattern": {"out": 2}}, "rank_pattern: 'out' matches no adapted layer; the first is layer/0/query"),
    ({"n_pattern": {"qu": 1}}, "n_pattern: 'qu' matches no adapted layer; the first is layer/0/query"),
    ({"alpha_pattern": {"out": 2}}, "alpha_pattern: 'out' matches no adapted layer; the first is layer/0/query"),
    ({"modules_to_save": ["pooler"]}, "modules_to_save: 'pooler' matches no module; the names there are: classifier,"),
    ({"r": [1, 2], "n_pattern": {"0.query": 1}}, "r=[1, 2] has 2 values for n=1 minis; give one value, or 1 (at layer"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    model = tiny.Encoder()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        mj.adapt(model, tiny.config(**changes), rngs=nnx.Rngs(0))
    tiny.assert_as_before(model, before)


def test_all_linear_without_a_linear_is_refused() -> None:
    model = nnx.Sequential(nnx.LayerNorm(6, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^targets='all-linear' matches no module: there is no Linear, "):
        mj.adapt(model, tiny.config(targets="all-linear", modules_to_save=[]), rngs=nnx.Rngs(0))


def test_adapting_twice_is_refused_and_changes_nothing() -> None:
    model = tiny.adapted()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"^the model has adapters already \(at .*\); take melora_jax.unwrap\(model\)"):
        mj.adapt(model, tiny.config(), rngs=nnx.Rngs(0))
    tiny.assert_as_before(model, before)


@pytest.mark.parametrize("function", [mj.merge, mj.unwrap, mj.describe])
def test_a_plain_model_has_nothing_to_merge_or_unwrap(function: Any) -> None:
    with pytest.raises(ValueError, match=r"^Encoder was not adapted; call melora_jax.adapt"):
        function(tiny.Encoder())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nnx.Linear(6, 10, rngs=nnx.Rngs(0)), "the model is itself a Linear, which can't be replaced in place"),
        (nnx.Dict(x=nnx.Linear(6, 10, rngs=nnx.Rngs(0))), "the model is a Dict, where adapt can't leave its config"),
        ([nnx.Linear(6, 10, rngs=nnx.Rngs(0))], "the model is a list, where adapt can't leave its config"),
    ],
)
def test_roots_that_can_not_be_changed_in_place_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mj.adapt(model, tiny.config(targets="all-linear", modules_to_save=[]), rngs=nnx.Rngs(0))


def test_a_copy_outlives_the_arrays_that_training_donates() -> None:
    model = tiny.adapted()
    copies = [mj.merge(model), mj.unwrap(model)]
    for _, variable in flat(model):
        if isinstance(variable, nnx.Param):
            variable.get_raw_value().delete()
    for copy in copies:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(copy)))
