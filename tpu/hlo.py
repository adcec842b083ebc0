"""Reads the text of an optimized HLO module: its computations, instructions and array sizes.

What the instructions cost is the business of `tpu.cost`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

DTYPE_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: str  # type of the result
    argument: str  # the text between the parentheses
    operands: tuple[str, ...]  # names of the operands
    attributes: str  # the text after the parentheses

    def called(self, role: str) -> str:
        """Name of the computation in the attribute `role`, such as `calls` or `body`."""
        match = re.search(rf"{role}=%?([\w.\-]+)", self.attributes)
        if match is None:
            raise ValueError(f"HLO instruction {self.name} has no attribute {role}")
        return match[1]


Computation = dict[str, Instruction]  # by name


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            current[match[1]] = _instruction(match[1], line[match.end() :])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Parse `RESULT OPCODE(ARGUMENT)ATTRIBUTES`."""
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    argument = text[opening + 1 : closing - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(name, opcode, text[:end], argument, operands, text[closing:])


def _closing(text: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]!r}")


def rounds(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """Iterations of a `while`: the compiler's count, or the largest constant in its condition."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(known[1])
    condition = computations[loop.called("condition")].values()
    return max(
        (int(op.argument) for op in condition if op.opcode == "constant" and op.argument.isdigit()),
        default=None,
    )


@dataclass(frozen=True)
class Array:
    shape: str  # such as f32[8,128]
    elements: int
    bytes: int  # in memory, padding included
    in_hbm: bool


def arrays(result: str) -> Iterator[Array]:
    """The arrays of a result type, which may be a tuple.

    On TPUs, a layout with `S(n)` is in on-chip or host memory. `T(8,128)` is the tile size: both
    minor dimensions are padded to whole tiles, so 64 elements of a row occupy 128.
    """
    for dtype, dimensions, layout in SHAPE.findall(result):
        if dtype not in DTYPE_BYTES:
            continue
        sizes = [int(size) for size in dimensions.split(",") if size]
        yield Array(
            f"{dtype}[{dimensions}]",
            math.prod(sizes),
            math.prod(_padded(sizes, layout)) * DTYPE_BYTES[dtype],
            "S(" not in layout,
        )


def _padded(sizes: list[int], layout: str) -> list[int]:
    """The sizes, rounded up to the layout's tiles."""
    tiled = re.match(r"([\d,]+):T\(([\d,]+)\)", layout)
    if tiled is None:
        return sizes
    padded = list(sizes)
    minor_to_major = map(int, tiled[1].split(","))
    for axis, tile in zip(minor_to_major, map(int, reversed(tiled[2].split(",")))):
        padded[axis] = -(-padded[axis] // tile) * tile
    return padded


def total_bytes(result: str) -> int:
    """Bytes of a result type in any memory."""
    return sum(array.bytes for array in arrays(result))


def hbm_bytes(result: str) -> int:
    """Bytes of a result type in HBM."""
    return sum(array.bytes for array in arrays(result) if array.in_hbm)


def first_hbm_bytes(result: str) -> int:
    """Bytes of the first array of a result type, 0 unless it is in HBM."""
    match = SHAPE.search(result)
    return hbm_bytes(match[0]) if match else 0


def group_size(attributes: str) -> int:
    """Number of devices in each group of a collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2  # collective-permute lists pairs instead
