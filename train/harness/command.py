"""`python -m train eval`: a model, plain or with an adapter, on tasks of lm-eval."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console

import melora_jax as mj
from melora_jax.models import abstract_model
from train.chat.speaker import adapter_folder
from train.data.tokens import read_tokenizer
from train.harness.results import Report, results_table, write_results

_SHOT_SEED = 1234  # lm-eval's own
_RESAMPLES = 1000  # for standard errors without a formula, which are then within about 2 %


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluates a model on tasks of lm-eval, or of train/harness/task_files."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a .gguf file or a hub id."""
    tasks: str
    """Names of tasks, groups or tags, with commas between them: mmlu,bbh,instructeval_drop."""
    adapter: str | None = None
    """A run's folder, or the folder of an adapter."""
    limit: float | None = None
    """How many rows of each task, or, below 1, what part of them."""
    num_fewshot: int | None = None
    """Shots of every task, except for those that have none; by default each task's own number."""
    include_path: str | None = None
    """A folder of more tasks, as lm-eval's YAML files. Python that they name is run: include only what you trust."""
    data: tuple[str, ...] = ()
    """TASK=FOLDER, one or more: rows from local files, one for each split (test.jsonl), instead of the hub."""
    output: str | None = None
    """Folder for results.json."""
    samples: bool = False
    """Also write every prompt, answer and score into samples.jsonl of the output folder."""
    batch_size: int = 8
    """How many prompts are computed together."""
    max_length: int | None = None
    """Tokens of a prompt and its answer; longer ones lose their first tokens. By default the model's limit."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model."""
    seed: int = 0
    """Seed of drawn answers."""
    apply_chat_template: bool = False
    """Put prompts into the tokenizer's chat template."""
    system_instruction: str | None = None
    """The system turn of the chat template, or, without a template, a text before each prompt."""
    fewshot_as_multiturn: bool = False
    """With the chat template: shots as turns of a conversation."""
    run_generated_code: bool = False
    """For tasks that score code: run what the model writes, in a sandbox without files, network or processes."""
    mesh: str | None = None
    """Devices that share the work: data=2,fsdp=2,tensor=2; an axis that is left out has size 1."""


def evaluate(words: Sequence[str]) -> int:
    """Evaluates by the options; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train eval")
    _check(options)
    _tame()
    evaluator = _evaluator()
    from train.harness.model import JaxLM
    from train.harness.tasks import load_tasks, parse_data

    chosen = _chosen(options)
    data = parse_data(options.data, chosen)
    mesh = _mesh(options.mesh)
    abstract_model(options.model, task="causal-lm")  # refuses an encoder before its tokenizer is read
    tokenizer = read_tokenizer(options.model)
    _check_tokenizer(options, tokenizer)
    tasks = load_tasks(chosen, data)
    model, adapter = _model(options, mesh)
    sizes = {"batch_size": options.batch_size, "max_length": options.max_length}
    lm = JaxLM(model, tokenizer, **sizes, seed=options.seed, mesh=mesh)
    _prepare(tasks["tasks"], options, lm)
    began = time.monotonic()
    found = evaluator.evaluate(
        lm=lm,
        task_dict=tasks,
        limit=options.limit,
        bootstrap_iters=_RESAMPLES,
        log_samples=options.samples,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
        confirm_run_unsafe_code=options.run_generated_code,
    )
    _show(Report(dataclasses.asdict(options), adapter, found, lm.shortened, time.monotonic() - began), options)
    return 0


def _chosen(options: Options) -> Any:
    """The tasks, as far as they are known without their data."""
    from train.harness.sandbox.sandbox import require_sandbox
    from train.harness.tasks import choose_tasks

    names = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    chosen = choose_tasks(names, None if options.include_path is None else Path(options.include_path))
    if chosen.code_tasks:
        if not options.run_generated_code:
            raise ValueError(
                f"{chosen.code_tasks[0]} runs the code that the model writes; allow it with --run-generated-code"
            )
        require_sandbox()
    return chosen


def _check(options: Options) -> None:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    if options.limit is not None and (options.limit <= 0 or (options.limit > 1 and options.limit % 1)):
        raise ValueError(f"--limit {options.limit:g} must be a whole number of rows, or a part of them below 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {options.num_fewshot} must be at least 0")
    if options.max_length is not None and options.max_length < 2:
        raise ValueError(f"--max-length {options.max_length} must be at least 2")
    if options.samples and options.output is None:
        raise ValueError("--samples are written into the output folder; give one with --output")
    if options.output is not None and Path(options.output).is_file():
        raise ValueError(f"--output {options.output} is a file; give a folder")
    if options.fewshot_as_multiturn and not options.apply_chat_template:
        raise ValueError("--fewshot-as-multiturn makes turns of shots; add --apply-chat-template")


def _check_tokenizer(options: Options, tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {options.model!r} has no token that ends a text; set its eos_token")
    if options.apply_chat_template and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {options.model!r} has no chat template; leave out --apply-chat-template")


def _tame() -> None:
    """Stops lm-eval from warning about intended settings, from running generated code, and from forking.

    It forks to resample, and a fork of a process that runs JAX may hang.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.pop("HF_ALLOW_CODE_EVAL", None)
    os.environ["DISABLE_MULTIPROC"] = "1"


def _evaluator() -> Any:
    try:
        from lm_eval import evaluator
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluation needs a package that is missing ({error.name}); install it with: pip install"
            " 'melora_jax[eval]', or make eval"
        ) from error
    return evaluator


def _mesh(sizes: str | None) -> Mesh | None:
    if sizes is None:
        return None
    axes: dict[str, int] = {}
    for word in sizes.split(","):
        name, _, size = word.partition("=")
        if name not in ("data", "fsdp", "tensor") or name in axes or not size.removeprefix("-").isdigit():
            raise ValueError(f"--mesh {sizes} is not of the form data=2,fsdp=2,tensor=2")
        axes[name] = int(size)
    return mj.make_mesh(**axes)


def _model(options: Options, mesh: Mesh | None) -> tuple[Any, dict[str, Any] | None]:
    """The model with its adapter, and the facts about the adapter for results.json."""
    if options.adapter is not None and not adapter_folder(options.adapter).is_dir():
        raise ValueError(f"no adapter at {options.adapter}; give a run's folder, or that of an adapter")
    model: Any = mj.from_pretrained(options.model, task="causal-lm", dtype=options.dtype, mesh=mesh)
    if options.adapter is None:
        return model, None
    folder = adapter_folder(options.adapter)
    adaptation = mj.load_adapter(model, folder)
    facts = json.loads((folder / "melora_config.json").read_text(encoding="utf-8"))
    tensors = hashlib.sha256((folder / "melora_adapter.safetensors").read_bytes()).hexdigest()
    sizes = {"parameters": adaptation.adapter, "head_parameters": adaptation.head}
    return model, {"folder": str(folder), "sha256": tensors, **sizes, "config": facts["config"]}


def _prepare(tasks: dict[str, Any], options: Options, lm: Any) -> None:
    """Sets in each task what lm-eval's own command sets, and refuses tasks that can only fail."""
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        asked = own if options.num_fewshot is None or own == 0 else options.num_fewshot
        task.set_config("num_fewshot", asked or 0)
        task.set_fewshot_seed(seed=_SHOT_SEED)
        if hasattr(task, "count_tokens"):
            if options.apply_chat_template or options.system_instruction is not None:
                raise ValueError(f"{name} has a protocol without chat template and system instruction; leave them out")
            task.count_tokens = lambda text: len(lm.tok_encode(text))
        if task.OUTPUT_TYPE == "generate_until":
            lm.require_room(task.get_config("generation_kwargs") or {}, f"task {name}")


def _show(report: Report, options: Options) -> None:
    console = Console()
    console.print(results_table(report))
    if report.shortened:
        console.print(f"{report.shortened:,} requests were longer than the model takes and lost their first tokens")
    console.print(f"{report.seconds:.0f} s on {jax.device_count()} {jax.default_backend()} device(s)", highlight=False)
    if options.output is not None:
        console.print(f"results: {write_results(report, Path(options.output))}", soft_wrap=True, highlight=False)
