"""How much memory a traced program holds at its fullest moment, from the shapes in its jaxpr alone.

The model of the compiler: element-wise operations are fused into what reads them, so that only the results of products,
reductions, gathers and loops are kept in memory, and of element-wise chains that which a product or several readers
need; an array lives from its making to its last use, its inputs' last use if it was fused away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jax.interpreters import partial_eval

Size = Callable[[Any], int]

# By the names of jax's primitives. Those that are inlined; those that give the same bytes another shape; those that are
# computed again wherever they are read; and those that are fused too, but never made twice.
_NAMES = {
    "calls": "jit pjit closed_call core_call checkpoint remat2 custom_jvp_call custom_vjp_call",
    "views": "reshape squeeze expand_dims copy copy_p optimization_barrier stop_gradient",
    "cheap": "add sub mul neg abs max min select_n broadcast_in_dim transpose convert_element_type eq ne lt le gt ge"
    " and or not xor sign floor ceil round clamp iota slice pad rev integer_pow square shift_left shift_right_logical"
    " shift_right_arithmetic is_finite add_any concatenate bitcast_convert_type",
    "costly": "exp exp2 log log1p expm1 tanh logistic erf erf_inv erfc sin cos rsqrt sqrt div rem pow cbrt atan2"
    " polynomial",
}
_CALLS, _VIEWS, _CHEAP, _COSTLY = (frozenset(names.split()) for names in _NAMES.values())
_FUSED = _CHEAP | _COSTLY
_MORE = 1.1


@dataclasses.dataclass(frozen=True)
class _Operation:
    """One operation of the flat program: indices of the values that it reads and makes, and bytes that it needs."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    inner: int = 0


Readers: TypeAlias = dict[int, list[_Operation]]


@dataclasses.dataclass
class _Program:
    """A jaxpr with its calls put in place: operations in order, and the bytes of each value; 0 for the inputs."""

    cpu: bool
    operations: list[_Operation] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    words: set[int] = dataclasses.field(default_factory=set)  # random ones that are kept

    def value(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1


def peak_bytes(
    closed: ClosedJaxpr, size: Size = lambda aval: bytes_of(aval), *, donated: int = 0, cpu: bool = False
) -> int:
    """The most bytes that the temporaries and results of a program take at once; its inputs are not counted.

    Args:
      closed: from `jax.make_jaxpr`.
      size: bytes of an abstract array; by default all of it.
      donated: how many of the first results take the place of inputs.
      cpu: count as XLA on CPU does, which multiplies bfloat16 in float32, and keeps the two words that each random
        number is made of where others keep what was made of it.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((10, 10), jnp.float32)
    >>> peak_bytes(jax.make_jaxpr(lambda x: jnp.tanh(x @ x) @ x + 1)(x))  # the first product, then the second
    800
    """
    return _peak(closed.jaxpr, size, cpu, donated)


def bytes_of(aval: Any) -> int:
    """Bytes of an abstract array; a random key counts its words."""
    dtype = aval.dtype
    if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return int(np.prod(aval.shape, dtype=np.int64)) * 16
    bits = jax.numpy.iinfo(dtype).bits if jax.numpy.issubdtype(dtype, np.integer) else 8 * dtype.itemsize
    return -(-int(np.prod(aval.shape, dtype=np.int64)) * bits // 8)


def _peak(jaxpr: Jaxpr, size: Size, cpu: bool, donated: int = 0) -> int:
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    program = _Program(cpu)
    known = {var: program.value(0) for var in (*jaxpr.invars, *jaxpr.constvars)}
    results = _flatten(jaxpr, known, program, size)
    for result in results[:donated]:
        program.sizes[result] = 0
    return _fullest(program, results)


def _flatten(jaxpr: Jaxpr, known: dict[Var, int], program: _Program, size: Size) -> list[int]:
    """Appends a jaxpr's operations to `program`; the values that it returns."""

    def look_up(atoms: Iterable[Any]) -> list[int]:
        return [program.value(0) if isinstance(atom, Literal) else known[atom] for atom in atoms]

    for equation in jaxpr.eqns:
        name, reads = equation.primitive.name, look_up(equation.invars)
        inner = _called(equation.params) if name in _CALLS else None
        if inner is not None:
            inside = dict(zip(inner.invars, reads, strict=True)) | {var: program.value(0) for var in inner.constvars}
            known |= zip(equation.outvars, _flatten(inner, inside, program, size), strict=True)
            continue
        drawn = program.cpu and name == "random_bits"
        made = [program.value(size(var.aval) * (2 if drawn else 1)) for var in equation.outvars]
        program.words |= set(made) if drawn else set()
        known |= zip(equation.outvars, made, strict=True)
        inner = _inner_bytes(equation.params, size, program.cpu)
        if program.cpu and name == "dot_general":
            inner += sum(2 * size(var.aval) for var in (*equation.invars, *equation.outvars) if _is_half(var.aval))
        program.operations.append(_Operation(name, tuple(reads), tuple(made), inner))
    return look_up(jaxpr.outvars)


def _called(parameters: dict[str, Any]) -> Jaxpr | None:
    found = next((parameters[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in parameters), None)
    return found.jaxpr if isinstance(found, ClosedJaxpr) else found


def _is_half(aval: Any) -> bool:
    return aval.dtype == jax.numpy.bfloat16


def _inner_bytes(parameters: dict[str, Any], size: Size, cpu: bool) -> int:
    """What the body of a loop, or the largest branch, needs beside its operands and results."""
    inside = [each for value in parameters.values() for each in (value if isinstance(value, tuple) else (value,))]
    bodies = [each.jaxpr if isinstance(each, ClosedJaxpr) else each for each in inside]
    return max((_peak(body, size, cpu) for body in bodies if isinstance(body, Jaxpr)), default=0)


def _fullest(program: _Program, results: Sequence[int]) -> int:
    source = _sources(program, results)
    last = _last_uses(program, results, source)
    dying: dict[int, list[int]] = {}
    for value, time in last.items():
        dying.setdefault(time, []).append(value)
    live = most = 0
    for time, operation in enumerate(program.operations):
        made = sum(program.sizes[value] for value in operation.makes if source[value] == (value,) and value in last)
        freed = sum(program.sizes[value] for value in dying.get(time, ()))
        in_place = min(made, freed) if operation.name in _FUSED else 0
        most = max(most, live + made - in_place + operation.inner)
        live += made - freed
    return most


def _last_uses(program: _Program, results: Sequence[int], source: list[tuple[int, ...]]) -> dict[int, int]:
    """When each value in memory is read last: the index of the operation."""
    last: dict[int, int] = {}
    for time, operation in enumerate(program.operations):
        stores = any(source[value] == (value,) for value in operation.makes)
        if stores or operation.name not in _FUSED | _VIEWS:
            last |= dict.fromkeys((root for value in operation.reads for root in source[value]), time)
    return last | dict.fromkeys((root for value in results for root in source[value]), len(program.operations))


def _sources(program: _Program, results: Sequence[int]) -> list[tuple[int, ...]]:
    """For each value the values in memory that it is read from: itself, or, where it is fused away, its inputs'."""
    readers, fused = _readers(program), _fused(program)
    source: list[tuple[int, ...]] = [(value,) for value in range(len(program.sizes))]
    returned = set(results)
    for operation in program.operations:
        below = tuple(dict.fromkeys(root for value in operation.reads for root in source[value]))
        for place, value in enumerate(operation.makes):
            if operation.name in _VIEWS:
                source[value] = source[operation.reads[place]]
            elif value not in returned and value in fused:
                # What several read is rather stored, if what it is made of takes more room; a vector beside does not.
                several = len(readers.get(value, [])) > 1 and not _is_recast(operation, readers)
                room = sum(program.sizes[root] for root in below if root not in program.words)
                source[value] = (value,) if several and room > _MORE * program.sizes[value] else below
    return source


def _readers(program: _Program) -> Readers:
    """The operations that read each value, also under another shape."""
    readers: Readers = {}
    for operation in reversed(program.operations):
        for place, value in enumerate(operation.reads):
            seen = readers.get(operation.makes[place], []) if operation.name in _VIEWS else [operation]
            readers[value] = readers.get(value, []) + seen
    return readers


def _fused(program: _Program) -> frozenset[int]:
    """The values that are made inside what reads them and never stored."""
    readers = _readers(program)
    fused: set[int] = set()
    copies: dict[int, int] = {}  # how often a value would be made, if it was fused into all that is made of it
    for operation in reversed(program.operations):
        value = operation.makes[0] if operation.makes else None
        if value is None or operation.name in _VIEWS:
            continue
        inside = readers.get(value, [])
        copies[value] = sum(copies.get(r.makes[0], 1) if r.makes and r.makes[0] in fused else 1 for r in inside)
        if operation.name not in _FUSED or (operation.name in _COSTLY and copies[value] > 1):
            continue
        products = _is_recast(operation, readers)
        if all(
            reader.name in _FUSED or reader.name.startswith("reduce") or (products and reader.name == "dot_general")
            for reader in inside
        ):
            fused.add(value)
    return frozenset(fused)


def _is_recast(operation: _Operation, readers: Readers) -> bool:
    """Whether it gives another dtype to what is kept anyway for others: products read that, and recast it."""
    return operation.name == "convert_element_type" and len(readers.get(operation.reads[0], [])) > 1
