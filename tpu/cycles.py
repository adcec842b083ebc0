"""Cycles of each kernel of a step, as XLA's compiler for TPUs estimates them when it chooses tiles.

A ranking of what costs time, not a time. There are no estimates of custom calls (Splash), nor of
waiting for other chips, nor for GPUs.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tpu.hlo import SHAPE, Computation, parse_hlo, rounds

ESTIMATE = re.compile(r'"estimated_cycles":"?(\d+)')


@dataclass(frozen=True)
class Kernel:
    """Kernels of the same kind, result and origin, over one step."""

    kind: str  # name of the instructions, without numbers
    result: str  # type of the (first) result, such as bf16[8,128]
    scope: str  # the operation in the program that they come from
    calls: int
    cycles: int


def estimated_kernels(text: str) -> list[Kernel]:
    """The kernels of an optimized module with estimates, those with the most cycles first."""
    computations, entry = parse_hlo(text)
    found: defaultdict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for kernel, calls, cycles in _walk(computations, entry, 1):
        found[kernel][0] += calls
        found[kernel][1] += calls * cycles
    kernels = [Kernel(*kernel, *numbers) for kernel, numbers in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.cycles)


def _walk(
    computations: dict[str, Computation], name: str, calls: int
) -> Iterator[tuple[tuple[str, str, str], int, int]]:
    """Yield (kind, result, scope), calls and cycles of one call, for each estimated instruction."""
    for op in computations[name].values():
        if op.opcode == "while":
            times = calls * (rounds(op, computations) or 1)
            yield from _walk(computations, op.called("body"), times)
        elif op.opcode in ("call", "async-start", "conditional"):
            inner = re.findall(r"(?:to_apply|calls|_computation)=%?([\w.\-]+)", op.attributes)
            for called in inner:
                yield from _walk(computations, called, calls)
        elif cycles := ESTIMATE.search(op.attributes):
            kind = re.sub(r"[\d.]*(\.clone)*[\d.]*$", "", op.name)
            shape, scope = SHAPE.search(op.result), re.search(r'op_name="([^"]*)"', op.attributes)
            result = f"{shape[1]}[{shape[2]}]" if shape else ""
            yield (kind, result, scope[1] if scope else ""), calls, int(cycles[1])
