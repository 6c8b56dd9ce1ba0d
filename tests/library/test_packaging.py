"""The package as its users get it: the wheel's content, what an import costs and drags in, what sources never do."""

from __future__ import annotations

import ast
import collections
import email
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import melora_jax

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def test_the_wheel_holds_the_library_alone(wheel):
    ours = {path.relative_to(ROOT).as_posix() for path in _sources("melora_jax")} | {"melora_jax/py.typed"}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == ours


def test_the_wheel_says_what_it_is_and_needs(wheel):
    prefix = f"melora_jax-{melora_jax.__version__}.dist-info/"
    metadata = email.message_from_bytes(wheel.read(prefix + "METADATA"))
    assert (metadata["Name"], metadata["Requires-Python"]) == ("melora_jax", ">=3.11")
    assert b"Apache License" in wheel.read(prefix + "licenses/LICENSE")
    base = {_canonical(Requirement(line).name) for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert base == {_canonical(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert not base & {"torch", "transformers", "datasets", "peft", "orbax-checkpoint", "matplotlib"}


def test_the_library_from_the_wheel_imports_without_the_application(wheel):
    code = """
import sys
sys.path[:0] = [sys.argv[1]]
sys.path = [path for path in sys.path if path not in ("", sys.argv[2])]
import melora_jax
print(melora_jax.__file__, "train" in sys.modules)
"""
    assert _python(code, wheel.filename, str(ROOT)).split() == [f"{wheel.filename}/melora_jax/__init__.py", "False"]


def test_importing_the_library_takes_under_two_seconds_more_than_jax_and_flax():
    """Both in one process, so that both meet the same machine; the least of three, since load only adds."""
    code = """
import time, jax, flax.nnx
start = time.perf_counter()
import melora_jax
print(time.perf_counter() - start)
"""
    assert min(float(_python(code)) for _ in range(3)) < 2.0


@pytest.mark.parametrize("module", ["melora_jax", "melora_jax.linen", "train", "train.__main__"])
def test_an_import_drags_in_no_other_framework(module):
    heavy = {"torch", "tensorflow", "peft", "keras"}
    if module.startswith("melora_jax"):
        heavy |= {"datasets", "matplotlib", "transformers", "train"}
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    assert not heavy & set(_python(code, module).split())


def _imports(path: Path) -> set[str]:
    """The packages that a source imports, at its top or in a function, less the standard library's and ours."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"melora_jax", "train"}


@pytest.mark.parametrize(
    ("folder", "extras"), [("melora_jax", ["gguf", "orbax"]), ("train", ["train", "eval", "tensorboard", "parity"])]
)
def test_every_import_is_a_stated_requirement(folder, extras):
    stated = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    names = {_canonical(Requirement(line).name) for line in stated}
    provider = packages_distributions()
    unstated = {
        f"{path.relative_to(ROOT)}: {package}"
        for path in _sources(folder)
        for package in _imports(path)
        if not names & {_canonical(name) for name in provider[package]}
    }
    assert not unstated


def test_every_public_name_is_there_once():
    assert sorted(set(melora_jax.__all__)) == sorted(melora_jax.__all__)
    assert all(hasattr(melora_jax, name) for name in melora_jax.__all__)


def test_about_twenty_five_names_stand_at_the_root():
    assert len(melora_jax.__all__) <= 30


# What `from melora_jax import ...` may take beside the names of its root.
ROOMS = {f"melora_jax.{path.stem}" for path in (ROOT / "melora_jax").iterdir()}


def _names_of(module: str) -> set[str] | None:
    """The names that `from module import ...` may take: `__all__` of a package; None for a module inside one."""
    found, depth = importlib.import_module(module), module.count(".")
    return {*getattr(found, "__all__", ()), "__version__"} if hasattr(found, "__path__") or depth == 1 else None


def _library_imports(source: str) -> list[tuple[str, list[str]]]:
    """Each import of melora_jax in a source: the module, and the names taken from it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [(alias.name, []) for alias in names if alias.name.partition(".")[0] == "melora_jax"]
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "melora_jax":
                found.append((module, [alias.name for alias in names]))
    return found


def _users() -> list[tuple[str, str]]:
    sources = [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in _sources("train")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    return [*sources, ("README.md", "\n".join(blocks))]


def test_the_library_is_used_by_its_public_names():
    hidden = []
    for path, source in _users():
        for module, names in _library_imports(source):
            public = _names_of(module)
            wrong = [module] if public is None else [f"{module}.{name}" for name in names if name not in public]
            hidden += [f"{path}: {name}" for name in wrong if name not in ROOMS]
    assert not hidden


def _packages() -> list[Path]:
    return [path for path in _sources("melora_jax", "train") if path.name == "__init__.py"]


@pytest.mark.parametrize("path", _packages(), ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_every_package_says_what_it_is_and_what_it_imports(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    root = path.parent.parent == ROOT
    assert text
    assert root or re.search(r"\b[Ii]mports? ", text), f"say in the docstring what {path.parent.name} may import"


def test_no_folder_holds_more_than_fifteen_files_and_no_file_more_than_400_lines():
    files = _sources("melora_jax", "train")
    folders = collections.Counter(path.parent for path in files)
    assert not {str(folder.relative_to(ROOT)): count for folder, count in folders.items() if count > 15}
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {path: count for path, count in lines.items() if count > 400}


def test_the_platform_is_asked_in_one_place():
    asked = [path for path in _sources("melora_jax") if "default_backend()" in path.read_text(encoding="utf-8")]
    assert len(asked) == 1
    assert asked[0].read_text(encoding="utf-8").count("default_backend()") == 1


def test_the_applications_help_imports_no_jax():
    code = "import sys; from train.__main__ import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "numpy", "transformers"} & set(done.stderr.split())
    assert "run" in done.stdout


def test_no_test_module_imports_another():
    modules = _sources("tests")
    pattern = re.compile(r"^\s*(?:from|import) tests[\w.]*\btest_", re.MULTILINE)
    assert not [str(path) for path in modules if pattern.search(path.read_text(encoding="utf-8"))]


FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"compile", "eval", "exec", "__import__"}
FORBIDDEN_ATTRIBUTES = {"torch.load", "os.popen", "os.system", "runpy.run_module", "runpy.run_path", "yaml.load"}
# The jail runs what a model wrote, once the kernel holds its process.
ALLOWED = {"train/harness/sandbox/jail.py": ["runpy.run_path"]}


def _dangers(source: str) -> list[str]:
    """What in a source could run bytes that came from a file: unpicklers, eval and its kin, a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.partition(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                found.append(name)
            case ast.Attribute() if ast.unparse(node) in FORBIDDEN_ATTRIBUTES:
                found.append(ast.unparse(node))
            case ast.keyword(arg="shell" | "allow_pickle" | "trust_remote_code", value=ast.Constant(value=True)):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", _sources("melora_jax", "train"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert _dangers(path.read_text(encoding="utf-8")) == ALLOWED.get(path.relative_to(ROOT).as_posix(), [])


def test_the_search_for_dangers_finds_each():
    lines = {
        "import pickle": "pickle",
        "from dill import load": "dill",
        "eval(text)": "eval",
        "torch.load(path)": "torch.load",
        "np.load(path, allow_pickle=True)": "allow_pickle=True",
        "subprocess.run(text, shell=True)": "shell=True",
        "os.system(text)": "os.system",
    }
    assert {line: _dangers(line) for line in lines} == {line: [danger] for line, danger in lines.items()}
    assert _dangers("model.eval(); re.compile(x); np.load(path); safetensors.torch.load(path)") == []


def _project_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_file_names_a_place_on_one_machine():
    # A path on the machine this was written on, or the address of a package index.
    place = re.compile(rb"(?<![\w.~}/])/(?:work|root|farm|tmp)/\w|pypi[.]org|pythonhosted[.]org")
    found = {
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in _project_files()
        if path.is_file() and path.suffix not in {".png", ".safetensors", ".npz"}
        for match in place.finditer(path.read_bytes())
    }
    assert not found


WITHOUT_TORCH = {"torch", "peft", "ruff", "pyright", "import-linter"}
PINS = [("py311", "3.11", set()), ("py312", "3.12", WITHOUT_TORCH), ("py312-jax0.11", "3.12", WITHOUT_TORCH)]


def _pinned(pins: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{pins}.txt").read_text(encoding="utf-8").splitlines()
    return {_canonical(name): version for name, version in (line.split("==") for line in lines if line[0] != "#")}


@pytest.mark.parametrize(("pins", "python", "left_out"), PINS)
def test_pins_cover_every_requirement_and_lie_in_its_range(pins, python, left_out):
    pinned, stated = _pinned(pins), [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = {Requirement(line) for group in stated for line in group}
    requirements = {r for r in requirements if r.marker is None or r.marker.evaluate({"python_version": python})}
    assert {r.name for r in requirements if _canonical(r.name) not in pinned} == left_out
    assert not [
        str(r) for r in requirements if r.name not in left_out and pinned[_canonical(r.name)] not in r.specifier
    ]


@pytest.mark.parametrize(
    ("python", "jax", "flax", "admitted"),
    [
        ("3.11", "0.10.2", "0.12.8", True),
        ("3.12", "0.11.2", "0.12.12", True),
        ("3.12", "0.12.0.1", "0.12.12", True),
        ("3.14", "0.12.0.1", "0.12.12", True),
        ("3.12", "0.11.2", "0.12.9", False),
        ("3.12", "0.12.1", "0.12.12", False),
        ("3.12", "0.10.2", "0.12.8", False),
    ],
)
def test_only_pairs_of_jax_and_flax_that_a_run_has_passed_are_admitted(python, jax, flax, admitted):
    versions = {"jax": jax, "flax": flax}
    requirements = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name in versions]
    here = [r for r in requirements if r.marker is not None and r.marker.evaluate({"python_version": python})]
    assert {r.name for r in here} == versions.keys()
    assert all(versions[r.name] in r.specifier for r in here) == admitted


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("python", ["3.12", "3.13", "3.14"])
def test_wheels_of_the_pinned_packages_exist_for_each_python(python, tmp_path):
    """lm-eval is left out: three of its small requirements come as source alone.

    Old versions of pip hold requires-python against their own Python, so it is looked at in pip's report.
    """
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["train"] + extras["tensorboard"] + extras["test"]
    wanted = [line.split(";")[0] for line in wanted if _holds(line, python) and not line.startswith("lm_eval")]
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--target", tmp_path]
    pip += ["--ignore-requires-python", "--report", report, "--python-version", python, "--only-binary=:all:"]
    pip += ["-c", ROOT / "constraints" / "py312.txt", *wanted]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=600)
    if re.search(r"\(from versions: none\)|Max retries|Connection", done.stderr) and not os.environ.get("CI"):
        pytest.skip("no package index here")
    assert done.returncode == 0, done.stderr[-4000:]
    found = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    assert {"jax", "flax", "transformers"} <= {package["name"].lower() for package in found}
    asked = {package["name"]: package["requires_python"] for package in found if "requires_python" in package}
    assert {name: span for name, span in asked.items() if f"{python}.0" not in SpecifierSet(span)} == {}


def _holds(requirement: str, python: str) -> bool:
    marker = Requirement(requirement).marker
    return marker is None or marker.evaluate({"python_version": python})


@pytest.mark.parity
@pytest.mark.parametrize("oracle", ["torch", "peft"])
def test_the_oracles_are_here(oracle):
    """Tests that compare with them stay away where they are missing; under Python 3.11 none may stay away unseen."""
    importlib.import_module(oracle)
