"""The layers of a deep model, run one after another, or equal ones as one `jax.lax.scan` over stacked variables.

A `Layers` list holds layers, each with its number, and, after `stack_layers`, runs of equal ones::

    layers/0  layers/1  ...  layers/29      →      one LayerRun: block/0, variables [30, ...]

Compile time then grows with the number of runs and not with the depth.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from melora_jax.core.dropout import numbered_layer, scanned_layers
from melora_jax.nn.tree import path_of, rewrite, walk

# Calls a layer: (layer, x, its number, its path, its entry of the cache) -> (x, the new entry)
Call = Callable[[Any, jax.Array, int, str, Any], tuple[jax.Array, Any]]


class LayerRun(nnx.Module):
    """Layers `first`, `first + 1` ... that repeat a block of `len(block)` layers `repeats` times.

    Args:
      block: the layers of one repeat; each variable has the repeats as its first axis.
      first: the number of the first layer.
      repeats: how often the block repeats.
    """

    def __init__(self, block: Sequence[nnx.Module], first: int, repeats: int) -> None:
        self.block = nnx.List(block)
        self.first = first
        self.repeats = repeats

    @property
    def numbers(self) -> range:
        """The numbers of the layers in the run."""
        return range(self.first, self.first + self.repeats * len(self.block))

    def scan(self, x: jax.Array, call: Call, path: str, cached: Sequence[Any]) -> tuple[jax.Array, list[Any]]:
        """Runs the layers. `cached` has an entry for each layer of the block, with the repeats as first axis."""
        graphdef, state = nnx.split(self.block)
        size = len(self.block)

        def repeat(x: jax.Array, at: tuple[jax.Array, nnx.State, list[Any]]) -> tuple[jax.Array, list[Any]]:
            start, values, entries = at
            kept = []
            for place, layer in enumerate(nnx.merge(graphdef, values, copy=True)):
                with numbered_layer(start + place, str(self.first + place)):
                    x, entry = call(layer, x, self.first + place, f"{path}/*", entries[place])
                kept.append(entry)
            return x, kept

        starts = jnp.arange(self.repeats) * size + self.first
        with scanned_layers():
            return jax.lax.scan(repeat, x, (starts, state, list(cached)))


class Layers(nnx.List):
    """A model's layers in order. Entries are layers and `LayerRun`s of them."""

    def run(
        self, x: jax.Array, call: Call, path: str, cached: Sequence[Any] | None = None
    ) -> tuple[jax.Array, list[Any]]:
        """Passes `x` through all layers.

        Args:
          x: what the first layer takes.
          call: calls one layer. In a run it is traced once for each layer of the block, with the number of the first
            repeat's: repeats differ only in the values of their variables. The path has "*" in place of the number.
          path: of this list.
          cached: an entry for each of `leads()`; None if layers keep nothing.

        Returns:
          The last layer's output, and the new entries.
        """
        left = iter([None] * len(self.leads()) if cached is None else cached)
        kept: list[Any] = []
        number = 0
        for entry in self:
            if isinstance(entry, LayerRun):
                x, entries = entry.scan(x, call, path, [next(left) for _ in entry.block])
                kept += entries
                number = entry.numbers.stop
            else:
                x, own = call(entry, x, number, f"{path}/{number}", next(left))
                kept.append(own)
                number += 1
        return x, kept

    def leads(self) -> list[tuple[int, ...]]:
        """The axes before those of a cache's arrays: none for a layer, the repeats for each layer of a run's block."""
        return [lead for entry in self for lead in _leads_of(entry)]


def _leads_of(entry: nnx.Module) -> Iterator[tuple[int, ...]]:
    if isinstance(entry, LayerRun):
        return iter([(entry.repeats,)] * len(entry.block))
    return iter([()])


M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Stacking:
    """What `stack_layers` did. Prints as a sentence.

    Attributes:
      layers: how many layers the model has.
      runs: (number of its first layer, layers in its block, repeats) of each run.
      single: numbers of the layers that stay alone, because no neighbour is equal.

    >>> print(Stacking(layers=7, runs=((0, 2, 3),), single=(6,)))
    7 layers in 1 scanned run(s): 0-5 (3 × 2); alone: 6
    """

    layers: int
    runs: tuple[tuple[int, int, int], ...]
    single: tuple[int, ...]

    def __str__(self) -> str:
        runs = [f"{first}-{first + size * repeats - 1} ({repeats} × {size})" for first, size, repeats in self.runs]
        alone = f"; alone: {', '.join(map(str, self.single))}" if self.single else ""
        return f"{self.layers} layers in {len(self.runs)} scanned run(s): {', '.join(runs) or 'none'}{alone}"


def stack_layers(model: nnx.Module) -> Stacking:
    """Puts runs of equal layers into stacked variables, in place: the last step before training.

    A run repeats one layer, or a block of a few (Gemma's local and global ones); layers are equal if they differ only
    in the values of their variables. `jax.lax.scan` runs them, so the time to compile does not grow with the depth. The
    model computes the same, dropout masks included, and `save_adapter`, `export_peft`, `merge` and `unwrap` give the
    same results as without stacking. Make optimizers and training steps after stacking.

    Args:
      model: one from `from_pretrained`, plain or adapted. Each variable `[...]` of a run becomes one `[repeats, ...]`,
        of the same dtype. They are stacked and freed one at a time, so that memory stays near the model plus its
        largest stack.

    Returns:
      Which layers were stacked.

    Raises:
      ValueError: it has no list of layers that can be stacked, or is stacked already. The model is unchanged.

    Source: `jax.lax.scan` over layers, as in levanter and MaxText.

    >>> from melora_jax.models import model_from_config
    >>> sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=5, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> print(stack_layers(model_from_config({"model_type": "llama", **sizes}, task="causal-lm")))
    5 layers in 1 scanned run(s): 0-4 (5 × 1)
    """
    lists = {id(node): (path_of(path), node) for path, node in walk(model) if isinstance(node, Layers)}
    if not lists:
        raise ValueError(f"{type(model).__name__} has no layers to stack; stack a model from from_pretrained")
    if is_stacked(model):
        raise ValueError("the layers are stacked already; unstack_layers(model) takes them apart")
    shared = _shared_variables(model)
    stacked = {identity: _stacked(layers, path, shared) for identity, (path, layers) in lists.items()}
    rewrite(model, lambda path, node: stacked.get(id(node), node))
    return _describe(stacked.values())


def unstack_layers(model: M) -> M:
    """The inverse of `stack_layers`, in place: every layer becomes a module of its own again.

    Args:
      model: stacked, or not, which leaves it as it is.

    Returns:
      The model itself; each stacked variable `[repeats, ...]` is split into `repeats` variables of the same dtype.

    >>> from melora_jax.models import model_from_config
    >>> sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=5, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "llama", **sizes}, task="causal-lm")
    >>> _ = stack_layers(model)
    >>> len(unstack_layers(model).model.layers)
    5
    """
    lists = {id(node): (path_of(path), node) for path, node in walk(model) if isinstance(node, Layers)}
    plain = {identity: Layers(_unstacked(layers, path)) for identity, (path, layers) in lists.items()}
    return rewrite(model, lambda path, node: plain.get(id(node), node))


def is_stacked(model: nnx.Module) -> bool:
    """Whether some of the model's layers are stacked."""
    return any(isinstance(node, LayerRun) for _, node in walk(model))


def unstacked(model: M, wanted: Any = ...) -> M:
    """A model like `model` whose layers are modules of their own: itself, or a copy if layers are stacked.

    Args:
      model: left as it is.
      wanted: NNX filter of the variables whose values the copy gets; the others have only shapes.
    """
    if not is_stacked(model):
        return model
    graphdef, kept, rest = nnx.split(model, wanted, ...)
    shapes = jax.tree.map(_shape_of, rest)
    return unstack_layers(nnx.merge(graphdef, kept, shapes, copy=True))


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))


def _shared_variables(model: nnx.Module) -> frozenset[int]:
    """Variables to which more than one path leads: stacking their layers would separate them."""
    paths = Counter(id(node) for _, node in walk(model) if isinstance(node, nnx.Variable))
    # walk enters a shared module once, so all that it holds is shared too
    modules = Counter(id(node) for _, node in walk(model) if isinstance(node, nnx.Module))
    inside = (
        id(variable)
        for _, node in walk(model)
        if isinstance(node, nnx.Module) and modules[id(node)] > 1
        for _, variable in walk(node)
        if isinstance(variable, nnx.Variable)
    )
    return frozenset(key for key, count in paths.items() if count > 1) | frozenset(inside)


def _stacked(layers: Layers, path: str, shared: frozenset[int]) -> Layers:
    entries = list(layers)
    for number, layer in enumerate(entries):
        _rename(layer, f"{path}/{number}/", f"{path}/*/")
    marks = [_mark(layer, shared) for layer in entries]
    found: list[nnx.Module] = []
    for first, size, repeats in _runs(marks):
        if repeats == 1:
            _rename(entries[first], f"{path}/*/", f"{path}/{first}/")
            found.append(entries[first])
        else:
            block = [_stack(entries[first + place : first + size * repeats : size]) for place in range(size)]
            found.append(LayerRun(block, first, repeats))
    return Layers(found)


def _rename(layer: nnx.Module, old: str, new: str) -> None:
    """Adapters hold their path, which has the layer's number, or "*" in a run."""
    adapters: list[Any] = [node for _, node in walk(layer) if isinstance(getattr(node, "path", None), str)]
    for adapter in adapters:
        if adapter.path.startswith(old):
            adapter.path = new + adapter.path.removeprefix(old)


def _mark(layer: nnx.Module, shared: frozenset[int]) -> Hashable:
    """Equal for layers that differ only in the values of their variables."""
    if any(id(node) in shared for _, node in walk(layer)):
        return object()
    graphdef, state = nnx.split(layer)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return graphdef, tuple((path_of(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves)


def _runs(marks: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """Cuts layers into (first, block size, repeats): at each place the shortest block that covers the most.

    >>> list(_runs("aabcbcbcd"))
    [(0, 1, 2), (2, 2, 3), (8, 1, 1)]
    """
    first = 0
    while first < len(marks):
        best = (first, 1, 1)
        for size in range(1, (len(marks) - first) // 2 + 1):
            repeats = _repeats(marks, first, size)
            if repeats > 1 and size * repeats > best[1] * best[2]:
                best = (first, size, repeats)
        yield best
        first += best[1] * best[2]


def _repeats(marks: Sequence[Hashable], first: int, size: int) -> int:
    count = 1
    block = marks[first : first + size]
    while marks[first + count * size : first + (count + 1) * size] == block:
        count += 1
    return count


def _stack(layers: Sequence[nnx.Module]) -> nnx.Module:
    """The first of equal layers, each of its variables holding the values of all; the others lose theirs."""
    variables = [[node for _, node in walk(layer) if isinstance(node, nnx.Variable)] for layer in layers]
    for equal in zip(*variables, strict=True):
        arrays = [variable.get_raw_value() for variable in equal]
        equal[0].set_raw_value(_join(arrays))
        for variable in equal[1:]:  # frees each array as soon as its copy is in the stack
            variable.set_raw_value(jax.ShapeDtypeStruct(variable.shape, variable.dtype))
    return layers[0]


def _join(arrays: Sequence[Any]) -> Any:
    first = arrays[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *first.shape), first.dtype)
    if isinstance(placed := getattr(first, "sharding", None), NamedSharding):
        # each layer's part stays on its device, whatever XLA would choose
        whole = NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec))
        return jax.jit(lambda *parts: jnp.stack(parts), out_shardings=whole)(*arrays)
    return jnp.stack(arrays)


def _unstacked(layers: Layers, path: str) -> Iterator[nnx.Module]:
    for entry in layers:
        if not isinstance(entry, LayerRun):
            yield entry
            continue
        blocks = [[nnx.clone(layer) for layer in entry.block] for _ in range(entry.repeats)]
        for place, layer in enumerate(entry.block):
            _take_apart(layer, [block[place] for block in blocks])
        for number, layer in zip(entry.numbers, (layer for block in blocks for layer in block), strict=True):
            _rename(layer, f"{path}/*/", f"{path}/{number}/")
            yield layer


def _take_apart(stack: nnx.Module, layers: Sequence[nnx.Module]) -> None:
    """Distributes the values of a stacked layer to single ones, variable by variable."""
    variables = [[node for _, node in walk(layer) if isinstance(node, nnx.Variable)] for layer in (stack, *layers)]
    for whole, *parts in zip(*variables, strict=True):
        values = whole.get_raw_value()
        for index, part in enumerate(parts):
            part.set_raw_value(_part(values, index))
        whole.set_raw_value(jax.ShapeDtypeStruct(values.shape, values.dtype))


def _part(values: Any, index: int) -> Any:
    placed = getattr(values, "sharding", None)
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, PartitionSpec(*placed.spec[1:]))
    if isinstance(values, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(values.shape[1:], values.dtype, sharding=placed)
    return jax.device_put(values[index], placed) if isinstance(placed, NamedSharding) else values[index]


def _describe(lists: Iterable[Layers]) -> Stacking:
    runs: list[tuple[int, int, int]] = []
    single: list[int] = []
    total = 0
    for layers in lists:
        number = 0
        for entry in layers:
            if isinstance(entry, LayerRun):
                runs.append((entry.first, len(entry.block), entry.repeats))
                number = entry.numbers.stop
            else:
                single.append(number)
                number += 1
        total += number
    return Stacking(total, tuple(runs), tuple(single))
