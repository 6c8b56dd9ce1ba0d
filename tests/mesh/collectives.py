"""What a compiled program sends: bytes of the operands of its collectives, by the mesh axes that they cross."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\([^)]*\)|\w+\[[\d,]*\]\S*) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")


def bytes_by_axes(compiled: Any, mesh: Mesh) -> dict[str, int]:
    """Operand bytes of all collectives by the axes along which their groups differ, such as "data+fsdp"."""
    sent: Counter[str] = Counter()
    for axes, size in collectives_of(compiled.as_text(), mesh):
        sent[axes] += size
    return dict(sent)


def over(axis: str, sent: dict[str, int]) -> int:
    """The bytes of the collectives that cross `axis`, alone or with others."""
    return sum(size for axes, size in sent.items() if axis in axes.split("+"))


def collectives_of(text: str, mesh: Mesh) -> list[tuple[str, int]]:
    """(axes, operand bytes) of each collective in the text of a compiled program."""
    lines = [found for line in re.sub(r"/\*.*?\*/", "", text).splitlines() if (found := _DEFINED.match(line))]
    shapes = {found[1]: found[2] for found in lines}
    seen = []
    for found in lines:
        if re.fullmatch(rf"({KINDS})(-start)?", found[3]):
            operands, _, attributes = found[4].partition(")")
            names = [name.strip().split()[-1].lstrip("%") for name in operands.split(", ")]
            axes = crossed(groups_of(attributes, mesh.size), mesh)
            seen.append((axes, sum(size_of(shapes[name]) for name in names)))
    return [(axes, size) for axes, size in seen if axes]


def size_of(shape: str) -> int:
    """Bytes of an HLO shape, an array's or a tuple's.

    >>> size_of("(f32[2,3]{1,0}, bf16[5])")
    34
    """
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        total += bits // 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def groups_of(attributes: str, devices: int) -> np.ndarray | list[list[int]]:
    """The groups of devices of a collective: written as lists, as a reshaped and transposed iota, or as axes of a mesh.

    >>> groups_of("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x=1", 4).tolist()
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups=mesh['a'=4] {'a':(1)2}", 4).tolist()
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups={{0,1},{2,3}}, x=1", 4), groups_of("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
    ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes + "}"):
        return [[int(n) for n in re.findall(r"\d+", pair)] for pair in re.findall(r"\{[\d,]+\}?", pairs[0])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source = ([int(n) for n in iota[k].split(",")] for k in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        return (ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", attributes):
        return _groups_of_axes(named[1], named[2], named[3])
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    assert listed, attributes
    groups = [[int(n) for n in re.findall(r"\d+", group)] for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    return groups or [list(range(devices))]


def _groups_of_axes(mesh: str, order: str | None, chosen: str) -> np.ndarray:
    """Groups that differ along the chosen axes, 'axis' or a part of one, 'axis':(size before it)size."""
    sizes = {name: [int(size)] for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = [(name, before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)]
    for name, before, size in parts:
        if size:
            whole = sizes[name][0]
            sizes[name] = [int(before), int(size), whole // int(before) // int(size)]
    axes, shape = [], []
    wanted = {name: bool(size) for name, _, size in parts}
    for name, split in sizes.items():
        if name in wanted:
            axes.append(len(shape) + (1 if wanted[name] else 0))
        shape += split
    ids = np.arange(math.prod(shape))
    if iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order or ""):
        ids = ids.reshape([int(n) for n in iota[1].split(",")])
        ids = ids.transpose([int(n) for n in iota[2].split(",")]) if iota[2] else ids
    others = [axis for axis in range(len(shape)) if axis not in axes]
    return ids.reshape(shape).transpose(others + axes).reshape(-1, math.prod(shape[axis] for axis in axes))


def crossed(groups: Any, mesh: Mesh) -> str:
    """The axes along which the members of a group differ; "" where no group has two members."""
    places = {device.id: place for place, device in np.ndenumerate(mesh.devices)}
    order = [device.id for device in mesh.devices.flat]
    axes = set()
    for group in groups:
        coordinates = np.array([places[order[int(member)]] for member in group])
        axes |= {mesh.axis_names[axis] for axis in range(3) if len(set(coordinates[:, axis])) > 1}
    return "+".join(name for name in mesh.axis_names if name in axes)


def compiled(function: Any, *arguments: Any) -> Any:
    """`function`, jitted and compiled for the arguments, where the mesh of `jax.set_mesh` is in force."""
    return jax.jit(function).lower(*arguments).compile()
