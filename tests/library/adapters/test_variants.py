"""DoRA, AdaLoRA, PiSSA and orthogonal starts: against PEFT for n=1, against NumPy for minis, and through every file."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.adapters import AdaLoRADense, DoRADense, PiSSADense, kind_of, orthogonality
from melora_jax.adapters.kinds import KINDS
from melora_jax.config import Kind
from melora_jax.models.auto import model_from_config
from melora_jax.training import RankBudget
from melora_jax.training.rank_allocator import within_budget
from tests.support import reference, tiny
from tests.support.tiny_run import DECODER_SIZES

pytestmark = pytest.mark.versions

VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"variant": "dora", "r": [1, 2], "alpha": [3, 5]},
    "AdaLoRA": {"variant": "adalora", "r": 3, "alpha": [3, 5]},
    "PiSSA": {"init": "pissa", "r": [1, 2], "alpha": [3, 5]},
    "orthogonal": {"init": "orthogonal", "r": 2, "alpha": [3, 5]},
}


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blocks_of(layer: Any, name: str) -> list[np.ndarray]:
    """A or B of each mini without padding."""
    array = np.asarray(getattr(layer, name)[...], np.float64)
    cut = (lambda x, r: x[:, :r]) if name.startswith("a") else (lambda x, r: x[:r])
    return [cut(x, r) for x, r in zip(array, layer.spec.r, strict=True)]


def expected_kernel(layer: Any) -> np.ndarray:
    """What the layer's kernel amounts to, by the papers' equations, in float64."""
    kernel, spec = np.asarray(layer.base.kernel[...], np.float64), layer.spec
    a, b = blocks_of(layer, "a"), blocks_of(layer, "b")
    if spec.variant == "adalora":
        a = [x * e for x, e in zip(a, np.asarray(layer.e[...], np.float64), strict=True)]
    whole = kernel + reference.delta(a, b, spec.scales, "identity")
    if spec.init == "pissa":
        whole -= reference.delta(blocks_of(layer, "a_start"), blocks_of(layer, "b_start"), spec.scales, "identity")
    if spec.variant == "dora":
        whole *= np.asarray(layer.magnitude[...], np.float64) / np.linalg.norm(whole, axis=0)
    return whole


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_is_its_equation_and_merges_to_it(name: str) -> None:
    model = tiny.adapted(**VARIANTS[name])
    layer, x = model.layer[0].query, drawn((4, tiny.WIDTH), 3)
    kernel = expected_kernel(layer)
    y = x @ kernel + np.asarray(layer.base.bias[...], np.float64)
    assert abs(y - np.asarray(layer.base(x))).max() > 0.1
    np.testing.assert_allclose(tiny.run(layer, x), y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mj.merge(layer).kernel[...], kernel, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer.delta(), kernel - np.asarray(layer.base.kernel[...]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_starts_as_its_base_and_gives_it_back(name: str) -> None:
    adaptation = tiny.check_round_trip(tiny.Encoder(), tiny.config(**VARIANTS[name]), tiny.IDS, start=2e-6)
    d_in, d_out = tiny.WIDTH, tiny.INNER
    latents = sum(np.broadcast_to(VARIANTS[name]["r"], 2))
    more = {"DoRA": d_out, "AdaLoRA": latents}.get(name, 0)
    assert {site.parameters for site in adaptation.sites} == {latents * (d_in + d_out) // 2 + more}
    assert {site.rank for site in adaptation.sites} == {latents * (2 if name == "PiSSA" else 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_training_changes_the_adapter_and_no_bit_of_the_base_or_the_start(name: str) -> None:
    model = tiny.Encoder()
    mj.adapt(model, tiny.config(**VARIANTS[name]), rngs=nnx.Rngs(1))
    before = tiny.arrays(model)
    tx = mj.make_optimizer(model, 0.05)
    step = mj.make_train_step(model, tx, lambda model, ids: (model(ids) ** 2).mean())
    state, frozen = mj.train_state(model, tx)
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, tiny.IDS, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    nnx.update(model, state.trainable, state.host)
    assert losses[2] < losses[0]
    after = tiny.arrays(model)
    tiny.assert_equal(tiny.arrays(model, mj.FrozenParam), {p: before[p] for p in tiny.arrays(model, mj.FrozenParam)})
    moved = {path.rpartition("/")[2] for path, value in before.items() if (after[path] != value).any()}
    assert {"a", "b"} | {"DoRA": {"magnitude"}, "AdaLoRA": {"e"}}.get(name, set()) <= moved


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_files_hold_all_of_it(name: str, tmp_path: Path) -> None:
    model = tiny.trained(**VARIANTS[name])
    mj.save_adapter(model, tmp_path / "adapter")
    fresh = tiny.Encoder()
    mj.load_adapter(fresh, tmp_path / "adapter")
    tiny.assert_equal(tiny.arrays(fresh), tiny.arrays(model))
    again = mj.load_adapter(tiny.trained(**VARIANTS[name]), tmp_path / "adapter")
    assert again == mj.describe(model)
    imported = tiny.Encoder()
    mj.import_peft(imported, mj.export_peft(model, tmp_path / "peft"))
    np.testing.assert_allclose(tiny.run(imported, tiny.IDS), tiny.run(model, tiny.IDS), rtol=0, atol=2e-6)
    if name in ("DoRA", "orthogonal"):
        even, imported = tiny.trained(**VARIANTS[name] | {"r": 2}), tiny.Encoder()  # mixed ranks have padding, not kept
        mj.import_peft(imported, mj.export_peft(even, tmp_path / "even"))
        tiny.assert_equal(tiny.arrays(imported), tiny.arrays(even))


def test_each_kind_is_one_class() -> None:
    assert set(KINDS) == set(get_args(Kind))
    assert all(kind.kind == name for name, kind in KINDS.items())
    assert set(KINDS.values()) == {mj.MELoRADense, *mj.MELoRADense.__subclasses__()}


def test_settings_of_another_kind_are_refused() -> None:
    message = r"^PiSSADense is for init='pissa', and the settings of PiSSADense are of kind 'plain'; take the class"
    with pytest.raises(ValueError, match=message):
        PiSSADense(6, 10, n=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^MELoRADense is for variant='plain', and the .* are of kind 'pissa'"):
        mj.MELoRADense(6, 10, n=2, init="pissa", rngs=nnx.Rngs(0))
    base, spec = nnx.Linear(6, 10, rngs=nnx.Rngs(0)), tiny.config(variant="dora").spec("here")
    with pytest.raises(ValueError, match=r"^AdaLoRADense is for variant='adalora', .* of here are of kind 'dora'"):
        AdaLoRADense.wrap(base, spec, path="here", rngs=nnx.Rngs(0))
    assert isinstance(kind_of(spec).wrap(base, spec, path="here", rngs=nnx.Rngs(0)), DoRADense)


def test_a_file_without_its_extra_arrays_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    mj.save_adapter(tiny.trained(**VARIANTS["DoRA"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "melora_adapter.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if not key.endswith("magnitude")}, file)
    with pytest.raises(ValueError, match=r"lacks the tensor layer/0/query/magnitude, which melora_config.json names"):
        mj.load_adapter(tiny.Encoder(), tmp_path / "adapter")
    save_file({key: value[:5] if key.endswith("magnitude") else value for key, value in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"query/magnitude has shape \[5\], and its adapter asks for \[10\]"):
        mj.load_adapter(tiny.Encoder(), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_stack_computes_and_saves_the_same(name: str, tmp_path: Path) -> None:
    settings = VARIANTS[name] | {"n": 2, "targets": ["q_proj", "up_proj"]}
    model = model_from_config(DECODER_SIZES, task="causal-lm", rngs=nnx.Rngs(3))
    mj.adapt(model, mj.MELoRAConfig(**settings), rngs=nnx.Rngs(1))
    tiny.stirred(model)
    y = tiny.run(model, tiny.IDS)
    mj.save_adapter(model, tmp_path / "alone")
    mj.stack_layers(model)
    np.testing.assert_allclose(tiny.run(model, tiny.IDS), y, rtol=0, atol=1e-5)
    mj.save_adapter(model, tmp_path / "stacked")
    names = ("melora_adapter.safetensors", "melora_config.json")
    assert all((tmp_path / "alone" / n).read_bytes() == (tmp_path / "stacked" / n).read_bytes() for n in names)


def test_pissa_starts_at_the_best_approximation_of_each_block() -> None:
    layer = PiSSADense(6, 10, n=2, r=[1, 2], alpha=[3, 5], init="pissa", rngs=nnx.Rngs(4))
    kernel = np.asarray(layer.base.kernel[...], np.float64)
    pairs = zip(blocks_of(layer, "a"), blocks_of(layer, "b"), layer.spec.scales, layer.spec.r, strict=True)
    for k, (a, b, scale, r) in enumerate(pairs):
        u, values, vt = np.linalg.svd(kernel[3 * k : 3 * k + 3, 5 * k : 5 * k + 5])
        np.testing.assert_allclose(scale * a @ b, (u[:, :r] * values[:r]) @ vt[:r], rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)


def test_orthogonal_factors_have_no_product_and_are_not_zero() -> None:
    layer = mj.MELoRADense(6, 10, n=2, r=4, init="orthogonal", rngs=nnx.Rngs(4))
    assert abs(layer.delta()).max() < 1e-6
    for name in ("a", "b"):
        assert abs(np.asarray(getattr(layer, name)[...])).min(axis=(1, 2)).max() > 1e-6
    halves = np.linalg.matrix_rank(np.asarray(layer.a[...])), np.linalg.matrix_rank(np.asarray(layer.b[...]))
    assert [list(half) for half in halves] == [[2, 2], [2, 2]]


# --- PEFT


def torch_linear(config: Any, kernel: np.ndarray, bias: np.ndarray) -> tuple[Any, Any]:
    """PEFT's model around one torch Linear, and its adapted layer."""
    import peft
    import torch

    host = torch.nn.ModuleDict({"linear": torch.nn.Linear(*kernel.shape)})
    with torch.no_grad():
        host["linear"].weight.copy_(torch.from_numpy(kernel.T.copy()))
        host["linear"].bias.copy_(torch.from_numpy(bias))
    model = peft.inject_adapter_in_model(config, host)
    return model, model["linear"]


def jax_gradients(layer: Any, x: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    graphdef, trainable, frozen = nnx.split(layer, mj.MELoRAParam, ...)

    def loss(trainable: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graphdef, trainable, frozen, copy=True)(x)
        return (y * c).sum(), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trainable, x)
    flat = {str(path[-1]): np.asarray(v.get_raw_value()) for path, v in nnx.to_flat_state(gradients[0])}
    return np.asarray(y), flat | {"x": np.asarray(gradients[1])}


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["DoRA", "PiSSA"])
def test_outputs_and_gradients_are_pefts(name: str) -> None:
    import peft
    import torch

    kernel, bias, x, c = (drawn(shape, k) for k, shape in enumerate([(6, 10), (10,), (5, 6), (5, 10)]))
    own = {"DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa"}}[name]
    _, theirs = torch_linear(peft.LoraConfig(r=3, lora_alpha=7, target_modules=["linear"], **own), kernel, bias)
    base = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
    base.kernel[...], base.bias[...] = jnp.asarray(kernel), jnp.asarray(bias)
    kind, init = {"DoRA": (DoRADense, "kaiming"), "PiSSA": (PiSSADense, "pissa")}[name]
    layer = kind(6, 10, n=1, r=3, alpha=7, init=init, base=base, rngs=nnx.Rngs(0))
    lora_a, lora_b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    if name == "PiSSA":
        ours = np.asarray(layer.a[...])[0] @ np.asarray(layer.b[...])[0]
        np.testing.assert_allclose((lora_b @ lora_a).detach().numpy().T, ours, rtol=0, atol=1e-5)
    else:
        magnitude = theirs.lora_magnitude_vector["default"].weight
        np.testing.assert_allclose(layer.magnitude[...], magnitude.detach().numpy(), rtol=1e-6)
        layer.magnitude[...] = jnp.asarray(drawn((10,), 9))
        magnitude.data = torch.from_numpy(drawn((10,), 9))
    a, b = drawn((6, 3), 7), drawn((3, 10), 8)
    layer.a[...], layer.b[...] = jnp.asarray(a[None]), jnp.asarray(b[None])
    lora_a.data, lora_b.data = torch.from_numpy(a.T.copy()), torch.from_numpy(b.T.copy())
    inputs = torch.from_numpy(x).requires_grad_()
    y = theirs(inputs)
    (y * torch.from_numpy(c)).sum().backward()
    output, gradients = jax_gradients(layer, x, c)
    expected = {"a": lora_a.grad.T[None], "b": lora_b.grad.T[None], "x": inputs.grad}
    expected |= {"magnitude": magnitude.grad} if name == "DoRA" else {}
    np.testing.assert_allclose(output, y.detach().numpy(), rtol=0, atol=3e-5)
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(gradients[key], value.numpy(), rtol=0, atol=1e-4, err_msg=key)


class Two(nnx.Module):
    """Two dense layers of unlike sizes."""

    def __init__(self) -> None:
        self.first: Any = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
        self.second: Any = nnx.Linear(10, 4, rngs=nnx.Rngs(1))


STEPS = {"tinit": 2, "tfinal": 3, "beta1": 0.7, "beta2": 0.8}


@pytest.mark.parity
def test_adalora_is_pefts_layer_and_its_budget_pefts_allocator() -> None:
    """The same random gradients for both: e is the same after each of 14 steps, zeros and all."""
    import peft
    import torch

    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, deltaT=2, total_step=14, lora_alpha=7, target_modules=["first", "second"], **STEPS
    )
    host = torch.nn.ModuleDict({"first": torch.nn.Linear(6, 10), "second": torch.nn.Linear(10, 4)})
    host.config = {"model_type": "custom"}
    theirs = peft.tuners.adalora.AdaLoraModel(host, {"default": config}, "default")
    model = Two()
    mj.adapt(
        model,
        mj.MELoRAConfig(n=1, r=5, alpha=7, variant="adalora", targets=["first", "second"]),
        rngs=nnx.Rngs(0),
    )
    tiny.stirred(model)
    for name in ("first", "second"):
        layer, other = getattr(model, name), host[name]
        other.base_layer.weight.data = torch.from_numpy(np.asarray(layer.base.kernel[...]).T.copy())
        other.base_layer.bias.data = torch.from_numpy(np.array(layer.base.bias[...]))
        for ours, key in (("a", "lora_A"), ("b", "lora_B"), ("e", "lora_E")):
            getattr(other, key)["default"].data = torch.from_numpy(np.asarray(getattr(layer, ours)[...])[0].T.copy())
        other.lora_E["default"].data = other.lora_E["default"].data.reshape(-1, 1)
        x = drawn((3, layer.view.d_in), 5)
        np.testing.assert_allclose(layer(x), other(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=2e-5)
    theirs.forward = None
    budget = RankBudget(target_r=2, delta_t=2, total_step=14, **STEPS)
    tx = within_budget(model, optax.sgd(0.1), budget)
    params = nnx.state(model, nnx.Param)
    state, update = tx.init(params), jax.jit(tx.update)
    names = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
    counts = []
    for step in range(1, 15):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(lambda p, rng=rng: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        for path, variable in nnx.to_flat_state(grads):
            parameter = getattr(host[path[0]], names[path[1]])["default"]
            gradient = torch.from_numpy(np.asarray(variable.get_raw_value())[0].T.copy()).reshape(parameter.shape)
            parameter.grad = gradient
            parameter.data = parameter.data - 0.1 * gradient
        theirs.update_and_allocate(step)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in ("first", "second"):
            ours, expected = np.asarray(params[name]["e"][...])[0], host[name].lora_E["default"].detach().numpy()[:, 0]
            np.testing.assert_array_equal(ours == 0, expected == 0, err_msg=f"{name} after step {step}")
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        counts.append(int(sum((np.asarray(params[name]["e"][...]) != 0).sum() for name in ("first", "second"))))
    assert counts == [10, 10, 10, 6, 10, 5, 10, 4, 10, 4, 4, 4, 4, 4]


@pytest.mark.parity
def test_the_penalty_is_pefts() -> None:
    import peft
    import torch

    layer = AdaLoRADense(6, 10, n=1, r=4, rngs=nnx.Rngs(0))
    layer.a[...], layer.b[...] = jnp.asarray(drawn((1, 6, 4), 1)), jnp.asarray(drawn((1, 4, 10), 2))

    class Host(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "custom"}
            self.linear = torch.nn.Linear(6, 10)

        def forward(self) -> Any:
            return types.SimpleNamespace(loss=torch.zeros(()))

    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["linear"], orth_reg_weight=1.0)
    host = Host()
    theirs = peft.tuners.adalora.AdaLoraModel(host, {"default": config}, "default")
    theirs.trainable_adapter_name = "default"
    host.linear.lora_A["default"].data = torch.from_numpy(drawn((1, 6, 4), 1)[0].T.copy())
    host.linear.lora_B["default"].data = torch.from_numpy(drawn((1, 4, 10), 2)[0].T.copy())
    assert float(orthogonality(layer)) == pytest.approx(float(theirs.forward().loss.detach()), rel=1e-6)


# --- budgets and bad input


def test_the_budget_falls_by_the_cube_and_ends_at_its_target() -> None:
    budget = RankBudget(target_r=2, total_step=20, tinit=4, tfinal=6)
    falling = [int((36 - 12) * (1 - (t - 4) / 10) ** 3 + 12) for t in range(5, 14)]
    assert budget.schedule(36, 12).tolist() == [36] * 5 + falling + [12] * 7


def test_minis_keep_what_matters_and_the_export_holds_no_more(tmp_path: Path) -> None:
    model = tiny.Encoder()
    settings = tiny.config(variant="adalora", r=3)
    mj.adapt(model, settings, rngs=nnx.Rngs(1))
    tx = mj.make_optimizer(model, 0.05, rank_budget=RankBudget(target_r=1, total_step=6, tinit=1, tfinal=2))
    step = mj.make_train_step(model, tx, lambda model, ids: model(ids).mean() ** 2 + 0.5 * orthogonality(model))
    state, frozen = mj.train_state(model, tx)
    for _ in range(6):
        state, _ = step(state, frozen, tiny.IDS, jax.random.key(0))
    nnx.update(model, state.trainable, state.host)
    e = {path: value for path, value in tiny.arrays(model, mj.MELoRAParam).items() if path.endswith("/e")}
    assert sum((value != 0).sum() for value in e.values()) == 4 * 2 * 1
    mj.export_peft(model, tmp_path / "peft")
    plain = tiny.Encoder()
    adaptation = mj.import_peft(plain, tmp_path / "peft")
    for site in adaptation.sites:
        assert sum(site.r) <= sum(max(1, int((row != 0).sum())) for row in e[f"{site.path}/e"])
    np.testing.assert_allclose(tiny.run(plain, tiny.IDS), tiny.run(model, tiny.IDS), rtol=0, atol=2e-6)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"variant": "dorra"}, "variant='dorra' is unknown; choose 'dora'"),
    ({"variant": "adalora", "r": [1, 2]}, "one r for all minis: leave r=\\[1, 2\\] out"),
    ({"variant": "adalora", "mixer": "shuffle", "r": 2}, "is defined for mixer=\"identity\" only, not 'shuffle'"),
    ({"variant": "dora", "init": "pissa"}, "init='pissa' is for variant=\"plain\", not 'dora'"),
    ({"init": "orthogonal", "r": 3}, "needs one even r for all minis, not \\[3, 3\\]; choose 2, 4, 6"),
    ({"init": "pissa", "dropout": 0.1}, "which dropout=0.1 would drop; set it to 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)


BAD_MODELS: list[tuple[dict[str, Any], str]] = [
    (
        {"variant": "dora", "targets": ["embed"], "n": 1},
        "embed can't be adapted: variant='dora' scales the outputs of a Linear or LinearGeneral, not of Embed",
    ),
    ({"init": "pissa", "r": 4}, "finds 3 directions in a block \\[3, 5\\], not r=4; lower r \\(at layer/0/query\\)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_MODELS)
def test_layers_that_have_no_such_adapter_are_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny.Encoder()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        mj.adapt(model, tiny.config(**changes), rngs=nnx.Rngs(0))
    tiny.assert_as_before(model, before)


def test_pissa_on_a_quantised_base_is_refused() -> None:
    model = nnx.Sequential(nnx.List([nnx.Linear(128, 24, rngs=nnx.Rngs(0))]))
    mj.quantize(model, "int8")
    with pytest.raises(ValueError, match=r"init='pissa' splits a kernel, and this one is quantised to int8"):
        mj.adapt(model, mj.MELoRAConfig(n=2, r=2, init="pissa", targets="all-linear"), rngs=nnx.Rngs(0))


def test_budgets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tinit=5 and tfinal=4 leave no step of total_step=9 in which ranks are alloc"
    ):
        RankBudget(target_r=1, total_step=9, tinit=5, tfinal=4)
    model = tiny.adapted(variant="adalora", r=2)
    with pytest.raises(ValueError, match=r"target_r=3 is above the r=2 that the layers start with"):
        mj.make_optimizer(model, 1e-3, rank_budget=RankBudget(target_r=3, total_step=9))
    with pytest.raises(ValueError, match=r"the model has no AdaLoRA layer for a RankBudget"):
        mj.make_optimizer(tiny.adapted(), 1e-3, rank_budget=RankBudget(target_r=3, total_step=9))


def test_arithmetic_takes_what_is_linear() -> None:
    from melora_jax.checkpoints.arithmetic import scale
    from melora_jax.checkpoints.save_load import adapter_tree

    model = tiny.trained(**VARIANTS["PiSSA"])
    doubled = scale(adapter_tree(model), 2.0)
    assert doubled.config.init == "kaiming"
    with pytest.raises(
        ValueError, match=r"layer/0/query is DoRA's, and arithmetic on adapters adds plain updates; mer"
    ):
        scale(adapter_tree(tiny.trained(**VARIANTS["DoRA"])), 2.0)
