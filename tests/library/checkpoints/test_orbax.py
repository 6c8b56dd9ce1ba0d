"""Orbax checkpoints of adapters and models, read back by a script that imports orbax and NumPy alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from melora_jax.adapters.params import FrozenParam
from melora_jax.checkpoints import save_orbax
from tests.support import disk, tiny
from tests.support.decoder_fixtures import random_decoder

pytestmark = pytest.mark.versions

# What a user without this library does: README.md's two lines, and every array written out by its path.
SCRIPT = """
import sys
import numpy as np
import orbax.checkpoint as ocp

arrays = {}
for folder in sys.argv[2:]:
    tree = ocp.StandardCheckpointer().restore(folder + "/tree")
    def visit(path, node):
        if isinstance(node, dict):
            for key, child in node.items():
                visit([*path, key], child)
        else:
            arrays["/".join(path)] = np.asarray(node).astype(np.float32)
    visit([folder], tree)
assert "melora_jax" not in sys.modules and "flax" not in sys.modules
np.savez(sys.argv[1], **arrays)
"""


def read_by_orbax_alone(out: Path, *folders: Path) -> list[dict[str, np.ndarray]]:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(out), *map(str, folders)]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    arrays = dict(np.load(out))
    return [
        {key.removeprefix(f"{folder}/"): value for key, value in arrays.items() if key.startswith(f"{folder}/")}
        for folder in folders
    ]


def test_orbax_alone_restores_each_part_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.trained(r=[1, 2], dtype=jnp.bfloat16)
    expected = {
        "adapter": tiny.arrays(model, nnx.Param),
        "merged": tiny.arrays(mj.merge(model)),
        "frozen": {path.replace("/base/", "/"): value for path, value in tiny.arrays(model, FrozenParam).items()},
    }
    folders = [save_orbax(model, tmp_path / part, part) for part in ("adapter", "merged", "frozen")]
    for part, found in zip(expected, read_by_orbax_alone(tmp_path / "found.npz", *folders), strict=True):
        assert found.keys() == expected[part].keys()
        for path, value in expected[part].items():
            np.testing.assert_array_equal(found[path], value.astype(np.float32))
        readme = (tmp_path / part / "README.md").read_text()
        rows = dict(re.findall(r"^\| `(.+)` \| (\[.*\] \| \w+) \|$", readme, re.MULTILINE))
        assert rows == {path: f"{list(value.shape)} | {value.dtype}" for path, value in expected[part].items()}
    own = mj.save_adapter(model, tmp_path / "own")
    assert (tmp_path / "adapter" / "melora_config.json").read_text() == (own / "melora_config.json").read_text()
    assert not (tmp_path / "merged" / "melora_config.json").exists()
    tiny.assert_equal(load_file(own / "melora_adapter.safetensors"), expected["adapter"])
    assert json.loads((own / "melora_config.json").read_text())["format"] == "melora_jax"


@pytest.mark.slow
def test_stacked_layers_are_written_one_by_one(tmp_path: Path) -> None:
    model = random_decoder("llama")
    mj.adapt(model, mj.MELoRAConfig(n=2, targets=["q_proj"]), rngs=nnx.Rngs(0))
    save_orbax(model, tmp_path / "before")
    mj.stack_layers(model)
    for part in ("adapter", "frozen", "merged"):
        save_orbax(model, tmp_path / part, part)
    rows = {part: (tmp_path / part / "README.md").read_text() for part in ("before", "adapter", "frozen", "merged")}
    assert rows["adapter"] == rows["before"]
    assert "| `model/layers/1/self_attn/q_proj/kernel` | [42, 60] | float32 |" in rows["frozen"]
    table = rows["frozen"].partition("| path")[2]
    assert table == rows["merged"].partition("| path")[2]


def test_what_can_not_be_saved_is_said_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^Encoder was not adapted; call melora_jax.adapt"):
        save_orbax(tiny.Encoder(), tmp_path / "x")
    unknown: Any = "head"
    with pytest.raises(ValueError, match=r"^part='head' is unknown; choose \"adapter\", \"merged\" or \"frozen\"$"):
        save_orbax(tiny.trained(), tmp_path / "x", unknown)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = disk.content(tmp_path)
    with pytest.raises(ValueError, match=r"holds files that would be lost \(notes.txt\); choose an empty folder"):
        save_orbax(tiny.trained(), tmp_path / "full")
    assert disk.content(tmp_path) == before
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"^orbax is not installed; pip install 'melora_jax\[orbax\]'$"):
        save_orbax(tiny.trained(), tmp_path / "x")
    assert disk.content(tmp_path) == before
