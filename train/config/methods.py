"""The methods: what each word of adapter.method stands for, resolved once into all that a run asks of it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import melora_jax as mj
from melora_jax.adapters import kind_of, orthogonality
from melora_jax.training import RankBudget
from train.config.schema import AdaLoRAConfig, AdapterConfig, MethodName, OptimConfig, Sections

TARGETS = ("query", "value")
LORA_PLUS_RATIO = 16.0  # of B's learning rate to A's, as LoRA+ (arXiv 2402.12354, section 5) advises


@dataclasses.dataclass(frozen=True)
class Method:
    """The sections [adapter] and [adalora], resolved: what a run trains, and how.

    Attributes:
      name: how tables call it.
      settings: what `melora_jax.adapt` takes.
      optim: the optimizer's settings, with the rates that the method has unless they are given.
      allocation: how ranks are allocated during the run; None for a method that keeps them.
    """

    name: str
    settings: mj.MELoRAConfig
    optim: OptimConfig
    allocation: AdaLoRAConfig | None = None

    def rank_budget(self, total_steps: int) -> RankBudget | None:
        """The budget of the adapters' ranks over a run; None for a method that keeps them.

        Raises:
          ValueError: values that do not fit together, naming the section.
        """
        if self.allocation is None:
            return None
        own, r = self.allocation, self.settings.r
        tinit = total_steps // 10 if own.tinit is None else own.tinit
        tfinal = 3 * total_steps // 10 if own.tfinal is None else own.tfinal
        widest = r if isinstance(r, int) else max(r)
        target = (widest + 1) // 2 if own.target_r is None else own.target_r
        try:
            return RankBudget(
                target_r=target,
                total_step=total_steps,
                tinit=tinit,
                tfinal=tfinal,
                delta_t=max(1, min(10, total_steps - tfinal - tinit)) if own.delta_t is None else own.delta_t,
                **{name: getattr(own, name) for name in ("beta1", "beta2") if getattr(own, name) is not None},
            )
        except ValueError as error:
            raise ValueError(f"[adalora] {error}") from None

    def penalty(self) -> Callable[[Any], Any] | None:
        """What the method adds to the loss, a function of the model; None for most."""
        if self.allocation is None:
            return None
        weight = 0.5 if self.allocation.orthogonality is None else self.allocation.orthogonality
        return (lambda model: weight * orthogonality(model)) if weight else None

    def varying_alpha(self) -> bool:
        """Whether runs trained in one step may differ in alpha, which then is one factor on all of a member's B.

        An alpha by path or by mini has no such factor, nor has a kind of adapter to which alpha is more than a factor
        of the update.
        """
        one_factor = not self.settings.alpha_pattern and not isinstance(self.settings.alpha, tuple)
        return one_factor and kind_of(self.settings).alpha_varies


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a word of adapter.method stands for.

    Attributes:
      name: how tables call it.
      fixed: settings that make it what it is; others contradict it.
      usual: settings that it has unless they are given.
      adapted: whether it has adapters, so that their settings mean something.
      b_ratio: of B's learning rate to `optim.learning_rate`.
      allocates: whether it allocates ranks during the run, as the section [adalora] says.
    """

    name: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapted: bool = True
    b_ratio: float | None = None
    allocates: bool = False


_ONE = {"n": 1, "mixer": "identity"}  # one mini-adapter is LoRA
_RANK = {"r": 8}  # PEFT's

PRESETS: dict[MethodName, Preset] = {
    "melora": Preset("MELoRA"),
    "lora": Preset("LoRA", _ONE | {"scaling": "mini"}, _RANK),
    "rslora": Preset("rsLoRA", _ONE | {"scaling": "rslora"}, _RANK),
    "lora+": Preset("LoRA+", _ONE | {"scaling": "mini"}, _RANK, b_ratio=LORA_PLUS_RATIO),
    "dora": Preset("DoRA", {"variant": "dora"}, _RANK | {"n": 1}),
    "adalora": Preset("AdaLoRA", {"variant": "adalora"}, _RANK | {"n": 1}, allocates=True),
    "gralora": Preset("GraLoRA", {"mixer": "shuffle"}, _RANK | {"n": 2}),
    "bitfit": Preset("BitFit", {"targets": (), "bias": "all"}, adapted=False),
    "head": Preset("head only", {"targets": (), "bias": "none"}, adapted=False),
    "full": Preset("full fine-tuning", {"targets": (), "bias": "none", "train_base": True}, adapted=False),
}


def resolve_method(config: Sections) -> Method:
    """The method of a run.

    Raises:
      ValueError: as for `melora_config`.
    """
    settings, preset, optim = melora_config(config.adapter), PRESETS[config.adapter.method], config.optim
    if preset.b_ratio is not None and optim.b_learning_rate is None:
        optim = dataclasses.replace(optim, b_learning_rate=preset.b_ratio * optim.learning_rate)
    return Method(preset.name, settings, optim, config.adalora if preset.allocates else None)


def melora_config(section: AdapterConfig) -> mj.MELoRAConfig:
    """What `melora_jax.adapt` takes for a section [adapter].

    Raises:
      ValueError: a key contradicts the method, or means nothing to it; or `MELoRAConfig` refuses the settings.

    >>> config = melora_config(AdapterConfig(method="rslora", r=4))
    >>> config.n, config.r, config.scaling, config.targets
    (1, 4, 'rslora', ('query', 'value'))
    """
    if section.method not in PRESETS:
        near = difflib.get_close_matches(str(section.method), PRESETS, n=1)
        hint = f"perhaps {near[0]!r}" if near else f"choose from {', '.join(PRESETS)}"
        raise ValueError(f"method={section.method!r} is unknown; {hint}")
    preset = PRESETS[section.method]
    given = _given(section)
    for key, value in given.items():
        _check(section.method, preset, key, value)
    settings: dict[str, Any] = {"targets": TARGETS, **preset.usual, **given, **preset.fixed}
    return mj.MELoRAConfig(**settings)


def _given(section: AdapterConfig) -> dict[str, Any]:
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {key: value for key, value in values.items() if key != "method" and value is not None and value != {}}


def _check(method: str, preset: Preset, key: str, value: Any) -> None:
    if key in preset.fixed:
        wanted = preset.fixed[key]
        if value != wanted:
            raise ValueError(
                f"{key}={value!r} contradicts method={method!r}, which is {key}={wanted!r}; leave it out, or take "
                'method="melora", which takes any'
            )
    elif not preset.adapted and key != "modules_to_save":
        raise ValueError(f"{key}={value!r} is of adapters, and method={method!r} has none; leave it out")


def section_for(method: MethodName, section: AdapterConfig) -> AdapterConfig:
    """A section's settings for another method, without those that contradict it or that it has no use for.

    >>> section_for("lora", AdapterConfig(n=2, r=8, dropout=0.05)) == AdapterConfig("lora", r=8, dropout=0.05)
    True
    """
    preset, default = PRESETS[method], AdapterConfig()
    dropped = {
        key: getattr(default, key)
        for key, value in _given(section).items()
        if preset.fixed.get(key, value) != value
        or (not preset.adapted and key not in preset.fixed and key != "modules_to_save")
    }
    return dataclasses.replace(section, method=method, **dropped)


def check_adalora(config: Sections) -> Iterator[str]:
    """What of the section [adalora] contradicts the rest, one problem at a time."""
    given = {key: value for key, value in vars(config.adalora).items() if value is not None}
    preset = PRESETS.get(config.adapter.method)
    if given and not (preset and preset.allocates):
        key, value = next(iter(given.items()))
        yield f"adalora.{key}={value!r} belongs to adapter.method=adalora, not {config.adapter.method}; unset it"
    if config.adalora.orthogonality is not None and not 0 <= config.adalora.orthogonality < math.inf:
        yield f"adalora.orthogonality={config.adalora.orthogonality!r} must be a finite number of at least 0"


def method_name(method: str) -> str | None:
    """How tables call a method; None for a word that is none."""
    return next((preset.name for word, preset in PRESETS.items() if word == method), None)
