"""Meshes, the rule table, and the places that follow from it; on one device, or on abstract meshes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import melora_jax as mj
from melora_jax.adapters.tensor_parallel import factor_sharding, whole_notes, why_whole
from melora_jax.config import AdapterSpec
from melora_jax.files.safetensors_io import TensorFile, write_tensors
from melora_jax.models import model_from_config
from melora_jax.nn.parallel import KernelCut, require_mesh
from melora_jax.nn.sharding import AXES, Layout, batch_spec, constrain, logical_axes, shardings_like
from melora_jax.nn.tree import path_of
from tests.support import decoder_fixtures, models_fixtures, tiny, tiny_run
from train.config.run_config import from_toml
from train.loop.setup import prepare

pytestmark = pytest.mark.versions

MESH = AbstractMesh((2, 2, 2), AXES)
TASK = "sequence-classification"
CONFIGS = {**models_fixtures.CONFIGS, **decoder_fixtures.CONFIGS}


def abstract(config: Any, task: str | None = None) -> Any:
    usual = "causal-lm" if "rms_norm_eps" in config else TASK
    return nnx.eval_shape(lambda: model_from_config(config, task=task or usual))


@pytest.mark.parametrize("task", [None, TASK])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_rules_cover_every_variable_of_every_family(name: str, task: str | None) -> None:
    model = abstract(CONFIGS[name], task)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        spec = model.layout.spec(path_of(path), variable.shape, MESH)
        for size, axis in zip(variable.shape, spec, strict=True):
            assert axis is None or size % MESH.shape[axis] == 0, path_of(path)


def test_a_llamas_specs() -> None:
    model = abstract(decoder_fixtures.CONFIGS["llama"])
    flat = nnx.to_flat_state(nnx.state(model))
    specs = {path_of(path): model.layout.spec(path_of(path), value.shape, MESH) for path, value in flat}
    layer = {path.removeprefix("model/layers/1/"): spec for path, spec in specs.items() if "/1/" in path}
    assert layer == {
        "input_layernorm/scale": P(None),
        "mlp/down_proj/kernel": P("tensor", "fsdp"),
        "mlp/gate_proj/kernel": P("fsdp", "tensor"),
        "mlp/up_proj/kernel": P("fsdp", "tensor"),
        "post_attention_layernorm/scale": P(None),
        "self_attn/k_proj/kernel": P("fsdp", "tensor"),
        "self_attn/o_proj/kernel": P("tensor", "fsdp"),
        "self_attn/q_proj/kernel": P("fsdp", "tensor"),
        "self_attn/v_proj/kernel": P("fsdp", "tensor"),
    }
    # 101 tokens are not two equal parts
    assert specs["lm_head/kernel"] == P("fsdp", None)
    assert specs["model/embed_tokens/embedding"] == P(None, "fsdp")


def test_heads_are_cut_between_heads_and_never_inside_one() -> None:
    layout, four = Layout(heads=6, kv_heads=2), AbstractMesh((1, 1, 4), AXES)
    assert layout.spec("layers/0/self_attn/q_proj/kernel", (42, 60), four) == P("fsdp", None)
    assert layout.spec("layers/0/self_attn/k_proj/kernel", (42, 20), four) == P("fsdp", None)
    assert layout.spec("layers/0/self_attn/o_proj/kernel", (60, 42), four) == P(None, "fsdp")


def test_a_stack_is_not_cut_along_its_layers() -> None:
    assert logical_axes("model/layers/mlp/up_proj/kernel", (7, 8, 8)) == (None, "embed", "mlp")


def test_a_variable_without_a_rule_is_an_error() -> None:
    message = r"^no sharding rule covers layers/0/conv/kernel of shape \[3, 5\]; add its path and logical axes to RULES"
    with pytest.raises(ValueError, match=message):
        logical_axes("layers/0/conv/kernel", (3, 5))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 2, "tensor": 3},
            "a mesh of data=2, fsdp=1, tensor=3 needs 6 devices, there are 1; choose sizes whose ",
        ),
        ({"data": -1, "fsdp": -1}, "mesh sizes (-1, -1, 1) hold -1 more than once; only one axis can take the rest"),
        ({"tensor": 0}, "mesh axis tensor=0 must be a whole number of at least 1, or -1 for the rest"),
        ({"fsdp": 2, "data": -1}, "a mesh of data=1, fsdp=2, tensor=1 needs 2 devices, there are 1"),
    ],
)
def test_meshes_that_the_devices_do_not_make(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mj.make_mesh(**sizes)


def test_rows_that_do_not_share_out_evenly_stay_together() -> None:
    assert batch_spec((8, 3), MESH) == (("data", "fsdp"), None)
    assert batch_spec((6, 3), MESH) == (None, None)
    assert batch_spec((), MESH) == ()


def test_without_a_mesh_nothing_is_constrained() -> None:
    x = jax.numpy.ones((4, 6))
    assert constrain(x, 1) is x
    with pytest.raises(ValueError, match=r"^no mesh is in force; enter jax.set_mesh\(mesh\)$"):
        require_mesh()


@pytest.mark.parametrize(
    ("n", "mixer", "reason"),
    [
        (4, "identity", None),
        (3, "identity", "n=3 is not a multiple of tensor=2"),
        (1, "identity", "n=1 is not a multiple of tensor=2"),
        (4, "shuffle", "mixer='shuffle' mixes the minis"),
        (4, "scatter", "mixer='scatter' mixes the minis"),
    ],
)
def test_minis_are_cut_where_their_number_divides(n: int, mixer: Any, reason: str | None) -> None:
    spec = AdapterSpec(n=n, r=(4,) * n, alpha=(1.0,) * n, mixer=mixer)
    assert why_whole(spec, 2) == reason


def test_off_a_mesh_factors_go_nowhere_and_need_no_word() -> None:
    spec, kernel = AdapterSpec(n=2, r=(1, 1), alpha=(1.0, 1.0)), jax.numpy.ones((4, 4))
    assert factor_sharding(kernel, spec) is None
    assert whole_notes([("layer", kernel, spec)]) == ()


def test_optimizer_state_lies_as_its_parameters_do() -> None:
    mesh = mj.make_mesh()
    places = {"a": NamedSharding(mesh, P("tensor")), "b": NamedSharding(mesh, P(None, "fsdp"))}
    parameters = {"head": {name: jax.ShapeDtypeStruct((2, 4), np.float32, sharding=at) for name, at in places.items()}}
    placed = shardings_like(jax.eval_shape(optax.adam(1e-3).init, parameters), parameters, mesh)
    assert placed[0].mu == placed[0].nu == {"head": places}
    assert placed[0].count == NamedSharding(mesh, P())


def test_a_step_for_a_mesh_wants_the_model_on_it() -> None:
    model = tiny.adapted()
    with pytest.raises(
        ValueError, match=r"^the model does not lie on this mesh; load it with from_pretrained\(\.\.\., "
    ):
        mj.make_train_step(model, mj.make_optimizer(model, 1e-3), lambda model, batch: 0.0, mesh=mj.make_mesh())


def test_dense_layers_and_tables_know_how_they_may_be_cut() -> None:
    model: Any = abstract(decoder_fixtures.CONFIGS["llama"])
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.cut == KernelCut(None, 6)
    assert attention.v_proj.cut == KernelCut(None, 2)
    assert attention.o_proj.cut == KernelCut(6, None)
    assert model.model.embed_tokens.units == decoder_fixtures.VOCAB
    bert: Any = abstract(models_fixtures.CONFIGS["bert"])
    assert bert.bert.embeddings.position_embeddings.units is None


def test_a_part_of_a_tensor_is_read_by_itself(tmp_path: Path) -> None:
    stored = np.arange(35, dtype=np.float32).reshape(5, 7)
    write_tensors(tmp_path / "x.safetensors", {"w": stored}, {})
    with TensorFile(tmp_path / "x.safetensors") as file:
        np.testing.assert_array_equal(file.read_part("w", (slice(1, 3), slice(None))), stored[1:3])
        np.testing.assert_array_equal(file.read_part("w", (slice(None, None, None), slice(4, 7))), stored[:, 4:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh.tensor", "0"], r"mesh.tensor=0 must be at least 1, or -1 for the rest of the devices"),
        (["--mesh.data", "-1", "--mesh.fsdp", "-1"], r"only one of mesh.data, mesh.fsdp and mesh.tensor can be -1"),
        (["--distributed.coordinator", "host:1"], r"distributed: coordinator='host:1', .*: give all three"),
        (
            ["--distributed.cluster", "auto", "--distributed.process", "1"],
            r"distributed.cluster=auto finds the processes;",
        ),
    ],
)
def test_settings_of_devices_that_contradict_each_other(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_toml(tiny_run.recipe(tmp_path), words)


def test_a_run_on_more_devices_than_there_are_changes_nothing(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tiny_run.make_material(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^\[mesh\] a mesh of data=1, fsdp=1, tensor=2 needs 2 devices, there are 1"):
        prepare(from_toml(recipe, ["--mesh.tensor", "2"]))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_may_give_its_mesh_in_one_line(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path)
    recipe.write_text("mesh = {data = 2, fsdp = -1}\n" + recipe.read_text(encoding="utf-8"), encoding="utf-8")
    assert from_toml(recipe).mesh.sizes == {"data": 2, "fsdp": -1, "tensor": 1}
