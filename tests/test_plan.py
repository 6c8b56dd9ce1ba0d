"""Planning a run's memory from shapes: against what XLA plans, by hand for small programs, and on meshes."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import pytest

from train.__main__ import main
from train.config import RunConfig
from train.devices import GIB, devices_from_name, rows_a_device
from train.liveness import peak_bytes
from train.plan import abstract_mesh, abstract_run, plan_run
from train.sections import AdapterConfig, DataConfig, ModelConfig, OutputConfig, TrainConfig

ENCODER = {
    "model_type": "bert",
    "vocab_size": 701,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
}
DECODER = ENCODER | {"model_type": "llama", "num_key_value_heads": 2}


def run_config(folder, config: dict, dtype="float32", remat="none", batch=2, length=32, **train) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(config))
    decoder = config["model_type"] == "llama"
    targets, saved = (("q_proj", "v_proj"), ()) if decoder else (("query", "value"), ("classifier",))
    return RunConfig(
        ModelConfig(str(folder), task="causal-lm" if decoder else "classification", dtype=dtype, remat=remat),
        AdapterConfig(n=8, targets=targets, modules_to_save=saved, dropout=0.05),
        DataConfig(train="t.jsonl", validation="v.jsonl", max_length=length),
        train=TrainConfig(batch_size=batch, **train),
        output=OutputConfig("runs/planned"),
    )


def test_the_plan_is_within_a_tenth_of_what_xla_plans(tmp_path):
    """On CPU XLA undoes remat and widens bfloat16, so that only a plain float32 step is planned there as elsewhere."""
    settings = run_config(tmp_path, DECODER)
    planned = plan_run(settings, abstract_mesh())
    run = abstract_run(settings, 2)
    found = run.step.lower(*run.arguments).compile().memory_analysis()
    held = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert planned.total == pytest.approx(held, rel=0.1)
    assert planned.activations + planned.gradients == pytest.approx(found.temp_size_in_bytes, rel=0.1)


def test_what_stays_in_memory_is_counted_exactly(tmp_path):
    """Base, adapters and Adam's two moments, from the sizes of a Llama."""
    planned = plan_run(run_config(tmp_path, DECODER, "bfloat16"), abstract_mesh())
    kernels = 2 * 192 * 192 + 2 * 192 * 96 + 3 * 192 * 512
    assert planned.base == 2 * (2 * 701 * 192 + 3 * (kernels + 2 * 192) + 192)
    adapters = 3 * (2 * 192 + 192 + 96)
    assert planned.trainable == planned.gradients == 4 * adapters
    assert planned.optimizer == pytest.approx(8 * adapters, abs=64)  # and the counts of steps
    assert planned.batch == 5 * 4 * 2 * 32


@pytest.mark.parametrize("config", [ENCODER, DECODER])
def test_rows_and_accumulation_scale_the_activations(tmp_path, config):
    one, two = (plan_run(run_config(tmp_path, config, batch=rows), abstract_mesh()) for rows in (8, 16))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    parts = plan_run(run_config(tmp_path, config, batch=16, accumulate=2), abstract_mesh())
    assert (parts.activations, parts.batch) == (one.activations, two.batch)


def test_remat_keeps_less(tmp_path):
    deep = DECODER | {"num_hidden_layers": 6}
    none, dots, full = (
        plan_run(run_config(tmp_path, deep, remat=how), abstract_mesh()) for how in ("none", "dots", "full")
    )
    assert none.activations > dots.activations > full.activations
    deeper = DECODER | {"num_hidden_layers": 8}
    more = plan_run(run_config(tmp_path, deeper, remat="full"), abstract_mesh())
    # what a layer more keeps is its input, [2 32 192] in float32
    assert more.activations - full.activations == pytest.approx(2 * 2 * 32 * 192 * 4, rel=0.1)


def test_a_mesh_divides_by_its_rules(tmp_path):
    config = run_config(tmp_path, DECODER, batch=8)
    alone, fsdp, tensor = (plan_run(config, abstract_mesh(*mesh)) for mesh in ((1, 1, 1), (1, 4, 1), (1, 1, 2)))
    vectors = 4 * (3 * 2 * 192 + 192)
    assert fsdp.base == (alone.base - vectors) // 4 + vectors
    tables = 4 * 2 * 701 * 192  # which an odd vocabulary leaves whole
    assert tensor.base == (alone.base - vectors - tables) // 2 + vectors + tables
    layer = 4 * (2 * 192 * 192 + 2 * 192 * 96 + 3 * 192 * 512 + 2 * 192)
    assert (alone.gathered, fsdp.gathered, tensor.gathered) == (0, layer, 0)
    assert fsdp.trainable == alone.trainable == 2 * tensor.trainable
    assert fsdp.activations == pytest.approx(alone.activations / 4, rel=0.05)
    assert alone.activations / 2 < tensor.activations < alone.activations


@pytest.mark.parametrize(
    ("program", "kept"),
    [
        (lambda x: x @ x, 400),
        (lambda x: jnp.tanh(x @ x) + 1, 400),  # in the product's own place
        (lambda x: jnp.sin(x) * jnp.sin(x + 1), 400),  # fused into one pass
        (lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=7)[0], 800),
        (lambda x: (x @ x).T @ x + (x @ x).sum(), 804),
        (lambda x: jax.jit(lambda y: (y @ y) @ y)(x), 800),
    ],
)
def test_peaks_of_small_programs(program, kept):
    x = jax.ShapeDtypeStruct((10, 10), jnp.float32)
    assert peak_bytes(jax.make_jaxpr(program)(x)) == kept


def test_devices_and_rows_that_do_not_fit():
    assert devices_from_name("h200x8").memory == 141 * GIB
    assert devices_from_name("cpu").count == 1
    for name in ("h101", "v5e-0", "v5e-8-8", ""):
        with pytest.raises(ValueError, match="is not known; give cpu, or one of v4, v5e"):
            devices_from_name(name)
    assert rows_a_device(16, 2, abstract_mesh(2, 2, 8)) == 2
    with pytest.raises(ValueError, match=r"train.batch_size=12 does not divide into 2 parts .* take 16"):
        rows_a_device(12, 2, abstract_mesh(2, 2, 1))


def test_the_command_says_what_fits_and_what_to_change(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(DECODER | {"vocab_size": 40_000_003}))
    recipe = tmp_path / "wide.toml"
    recipe.write_text(
        f'[model]\nname = "{tmp_path}"\ntask = "causal-lm"\n[data]\ntrain = "a.jsonl"\nvalidation = "b.jsonl"\n'
        'max_length = 32\n[adapter]\ntargets = ["q_proj"]\nmodules_to_save = []\n[train]\nbatch_size = 8\n'
    )
    assert main(["plan", str(recipe), "--device", "v5e-8", "v5p-8"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"fits +no +yes", out)
    assert "v5e-8: does not fit; " in out
    assert "--model.dtype bfloat16" in out
    assert main(["plan", str(recipe), "--device", "v5p-8", "--tensor", "3"]) == 2
    assert "--tensor 3 do not divide 8 x v5p" in capsys.readouterr().err
