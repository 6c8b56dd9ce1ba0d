"""Planning a run's memory from shapes: against what XLA plans, by hand for small programs, and on meshes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.app.commands.plan_main import DECODER, ENCODER, SMALL, run_config
from train.__main__ import main
from train.config.schema import AdapterConfig
from train.lab.memory.devices import GIB, devices_from_name, rows_a_device
from train.lab.memory.liveness import peak_bytes
from train.lab.memory.planning import abstract_mesh, plan_run

ROOT = Path(__file__).resolve().parents[3]

# XLA on CPU takes away the barriers that keep remat and dequantising from being undone, removes what is then common to
# the forward and the backward pass, and starts operations early to run them at once. Compilers of accelerators do
# neither, and with these off the compiled figure is of the same program.
AS_ELSEWHERE = (
    "--xla_disable_hlo_passes=cse,cse_barrier_expander --xla_cpu_enable_concurrency_optimized_scheduler=false"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Planned and compiled bytes of each small run: all, and what is no argument; from a process with XLA's flags."""
    folder = tmp_path_factory.mktemp("small")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": AS_ELSEWHERE, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.app.commands.plan_main", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_plan_is_within_a_tenth_of_what_xla_plans(compiled, name):
    planned, held = compiled[name]
    assert planned == pytest.approx(held, rel=0.1)


def test_what_stays_in_memory_is_counted_exactly(tmp_path):
    """Base, adapters and Adam's two moments, from the sizes of a Llama."""
    planned = plan_run(run_config(tmp_path, DECODER, "bfloat16"), abstract_mesh())
    kernels = 2 * 192 * 192 + 2 * 192 * 96 + 3 * 192 * 512
    assert planned.base == 2 * (2 * 701 * 192 + 3 * (kernels + 2 * 192) + 192)
    adapters = 3 * (2 * 192 + 192 + 96)
    assert planned.trainable == planned.gradients == 4 * adapters
    assert planned.optimizer == pytest.approx(8 * adapters, abs=64)  # and the counts of steps
    assert planned.batch == 5 * 4 * 2 * 32


@pytest.mark.slow
@pytest.mark.parametrize("config", [ENCODER, DECODER])
def test_rows_and_accumulation_scale_the_activations(tmp_path, config):
    one, two = (plan_run(run_config(tmp_path, config, batch=rows), abstract_mesh()) for rows in (8, 16))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    parts = plan_run(run_config(tmp_path, config, batch=16, accumulate=2), abstract_mesh())
    assert (parts.activations, parts.batch) == (one.activations, two.batch)


@pytest.mark.slow
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


@pytest.mark.slow
def test_shapes_of_known_models_are_planned_without_their_files(tmp_path, capsys):
    recipe = ROOT / "train" / "recipes" / "alpaca-llama2-7b.toml"
    assert main(["plan", str(recipe), "--shapes", "llama-2-7b", "--device", "v5e"]) == 1
    out = capsys.readouterr().out
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096
    assert re.search(rf"base +{2 * (kernels + 65 * 4096) / GIB:.3f}\n", out)
    assert "llama-2-7b, bfloat16, remat none, 128 rows of 256 tokens" in out
    assert main(["plan", str(recipe), "--shapes", "gpt-2", "--device", "v5e-8"]) == 2
    assert (
        "choose from llama-2-7b, llama-3-70b, llama-3-8b, roberta-base, or give --model.name" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("section", "more"),
    [
        (AdapterConfig(method="dora", n=8, r=1), 3 * (192 + 96)),
        (AdapterConfig(method="adalora", r=4), 3 * 2 * 4),
        (AdapterConfig(n=8, r=4, init="pissa"), 0),
    ],
    ids=["dora", "adalora", "pissa"],
)
def test_what_methods_have_beside_their_factors_is_counted_on_one_device_and_refused_on_several(
    tmp_path, section, more
):
    section = dataclasses.replace(section, targets=("q_proj", "v_proj"), modules_to_save=())
    config = dataclasses.replace(run_config(tmp_path, DECODER), adapter=section)
    planned = plan_run(config, abstract_mesh())
    assert planned.trainable == 4 * (config.method.settings.r * 3 * (2 * 192 + 192 + 96) + more)
    with pytest.raises(ValueError, match="runs on one device and not on 2; plan for one"):
        plan_run(config, abstract_mesh(tensor=2))
