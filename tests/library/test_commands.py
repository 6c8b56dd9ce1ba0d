"""`python -m melora_jax`: each command against the function it stands for, and what is wrong with its input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.__main__ import main
from melora_jax.checkpoints.inspect import inspect_adapter
from melora_jax.core.spectrum import effective_rank
from tests.support import disk, tiny
from tests.support.decoder_fixtures import apply, checkpoint, token_ids


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def adapted(base: Path, **settings: Any) -> Any:
    model = mj.from_pretrained(base, task="causal-lm")
    mj.adapt(model, mj.MELoRAConfig(**({"n": 2, "r": 2, "targets": ["q_proj", "v_proj"]} | settings)), rngs=nnx.Rngs(0))
    return tiny.stirred(model)


def test_export_writes_what_export_peft_writes(base: Path, tmp_path: Path) -> None:
    model = adapted(base, layers=[1], r=[1, 3], alpha=[4, 9])
    mj.save_adapter(model, tmp_path / "own")
    for kind in ("lora", "bdlora"):
        mj.export_peft(model, tmp_path / f"{kind} by hand", kind)
        assert main(["export", f"{tmp_path}/own", f"{tmp_path}/{kind}", "--format", kind]) == 0
        assert disk.content(tmp_path / kind) == disk.content(tmp_path / f"{kind} by hand")


def test_import_and_merge_give_the_same_model(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    mj.export_peft(model, tmp_path / "peft")
    assert main(["import", f"{tmp_path}/peft", f"{tmp_path}/own"]) == 0
    again = mj.from_pretrained(base, task="causal-lm")
    mj.load_adapter(again, tmp_path / "own")
    tiny.assert_equal(tiny.arrays(again), tiny.arrays(model))
    expected = apply(mj.merge(model), token_ids())
    for source in ("own", "peft"):
        assert main(["merge", f"{tmp_path}/{source}", f"{tmp_path}/merged {source}", "--base", str(base)]) == 0
        merged = mj.from_pretrained(tmp_path / f"merged {source}", task="causal-lm")
        np.testing.assert_array_equal(apply(merged, token_ids()), expected)


def test_compress_finds_the_minis_in_a_fine_tuned_model(base: Path, tmp_path: Path, capsys: Any) -> None:
    model = adapted(base)
    tuned: Any = mj.merge(model)
    tuned.model.norm.scale[...] += 0.5
    mj.save_pretrained(tuned, tmp_path / "tuned")
    assert main(["compress", f"{tmp_path}/tuned", f"{tmp_path}/own", "--base", str(base), "--n", "2", "--r", "2"]) == 0
    assert "left out: model/norm/scale (norm of its change 3.24)" in capsys.readouterr().out  # 0.5·√42
    again: Any = mj.from_pretrained(base, task="causal-lm")
    found = mj.load_adapter(again, tmp_path / "own")
    assert {(site.path, site.n, site.r) for site in found.sites} == {
        (site.path, site.n, site.r) for site in mj.describe(model).sites
    }
    for layer, other in zip(again.model.layers, model.model.layers, strict=True):
        np.testing.assert_allclose(layer.self_attn.q_proj.delta(), other.self_attn.q_proj.delta(), rtol=0, atol=1e-5)


def test_compress_of_an_adapter_says_what_minis_can_not_hold(base: Path, tmp_path: Path, capsys: Any) -> None:
    mj.save_adapter(adapted(base, n=1, r=3, targets=["q_proj"], layers=[0]), tmp_path / "lora")
    assert main(["compress", f"{tmp_path}/lora", f"{tmp_path}/own", "--n", "2", "--r", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["site", "off", "blocks", "inside", "error"]
    path, off_blocks, _, error = out[1].split()
    assert path == "model/layers/0/self_attn/q_proj"
    assert 20 < float(off_blocks.rstrip("%")) < 80
    assert 0.5 < float(error) < 1


def test_inspect_measures_the_update(tmp_path: Path, capsys: Any) -> None:
    model = tiny.trained(r=[1, 2], alpha=[4, 10])
    own, peft = mj.save_adapter(model, tmp_path / "own"), mj.export_peft(model, tmp_path / "peft")
    layer: Any = model.layer[0].query
    values = np.linalg.svd(np.asarray(layer.delta(), np.float64), compute_uv=False)
    for folder, kind in ((own, "melora_jax's own format"), (peft, "PEFT format")):
        found = inspect_adapter(folder)
        (site,) = [site for site in found.sites if site.path == "layer/0/query"]
        assert (site.d_in, site.d_out, site.n, site.r, site.rank) == (6, 10, 2, (1, 2), 3)
        assert site.norm == pytest.approx(np.linalg.norm(values), rel=1e-6)
        assert site.largest == pytest.approx(values[0], rel=1e-6)
        assert site.effective_rank == pytest.approx(effective_rank(values[:3]), rel=1e-5)
        assert found.parameters == mj.describe(model).trainable
        assert found.size == sum(map(len, disk.content(folder).values()))
        assert (found.format, found.saved) == (kind, ("classifier/bias", "classifier/kernel"))
        assert main(["inspect", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{folder}: {kind}, {found.parameters:,} parameters, {found.size:,} bytes"
        assert lines[2].split() == ["site", "d_in", "d_out", "n", "r", "rank", "effective", "norm", "largest"]
        assert lines[3].split()[:6] == ["layer/0/query", "6", "10", "2", "1,2", "3"]
    assert lines[-4:] == [
        "  PEFT: as it is",
        "  vLLM: with --max-lora-rank 8",
        "  SGLang: no, it ignores classifier.bias, which was trained",
        "  llama.cpp: no, its converter refuses classifier.bias, which is not a LoRA factor",
    ]


@pytest.mark.parametrize("command", ["export", "merge", "import", "inspect", "compress"])
def test_help_shows_an_example(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    assert f"example:\n  python -m melora_jax {command} " in capsys.readouterr().out


def test_what_is_wrong_is_one_line_and_writes_nothing(base: Path, tmp_path: Path, capsys: Any) -> None:
    own = mj.save_adapter(tiny.trained(), tmp_path / "own")
    lora = mj.save_adapter(adapted(base), tmp_path / "lora")
    before = disk.content(tmp_path)
    for words, message in (
        (
            ["inspect", f"{tmp_path}/none"],
            "none is not an adapter folder: it has neither melora_adapter.safetensors nor",
        ),
        (["export", str(own), f"{tmp_path}/x"], "own does not name its base model; give its folder or hub id with --b"),
        (
            ["merge", str(own), f"{tmp_path}/x", "--base", str(base)],
            "own does not fit this model: modules_to_save: 'classifi",
        ),
        (["import", str(own), f"{tmp_path}/x"], "adapter_config.json does not exist; check the folder's name"),
        (["compress", str(base), f"{tmp_path}/x", "--n", "2", "--r", "1"], "is a whole model; say with --base what it"),
        (
            ["compress", str(lora), f"{tmp_path}/x", "--n", "4", "--r", "1"],
            "n=4 does not divide d_",
        ),
        (
            ["compress", str(base), f"{tmp_path}/x", "--n", "2", "--r", "1", "--base", str(base)],
            "no dense layer that targets=[] names differs between",
        ),
    ):
        assert main(words) == 2
        out = capsys.readouterr()
        assert out.out == ""
        assert out.err.startswith("error: ")
        assert message in out.err
        assert out.err.count("\n") == 1
        assert disk.content(tmp_path) == before


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    mj.save_adapter(tiny.trained(dtype=jnp.bfloat16), tmp_path / "own")
    command = [sys.executable, "-m", "melora_jax", "inspect", str(tmp_path / "own")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "melora_jax: by load_adapter" in done.stdout
