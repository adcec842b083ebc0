"""What a compiled step costs: FLOPs from its jaxpr, HBM traffic and collectives from its optimised
HLO.

XLA's own `cost_analysis` counts the body of a loop once, and a Pallas kernel as nothing; both are
counted here.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.kernels import CUDNN_BACKWARD, CUDNN_FORWARD

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
# Bytes that a device sends, as a multiple of the result's (of the operand's for reduce-scatter),
# in a group of n.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "iota",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "while",
    "conditional",
    "call",
}
# move nothing
FREE_CALLS = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"'
)
SLICES = {"dynamic-slice", "slice", "gather"}
# which operand is written into the first, in place
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


# --------------------------------------------------------------------------------------------------


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of query and key that causal attention over one row with this window computes."""
    span = length if window is None else min(window + 1, length)
    return span * (span + 1) // 2 + (length - span) * span


def jaxpr_flops(jaxpr: Any, config: GPTConfig, *, platform: str) -> float:
    """FLOPs of the products of a traced step on "cpu", "tpu" or "cuda", over all devices,
    recomputation included.

    A fused attention kernel counts for the pairs that its mask leaves (a Pallas kernel's averaged
    over the layers): 2 products forward, 5 backward.
    """
    pairs = (
        sum(visible_pairs(config.sequence_len, window) for window in config.windows)
        / config.n_layer
    )

    def walk(jaxpr: Any, times: float) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                lhs = eqn.invars[0].aval.shape
                total += (
                    times
                    * 2.0
                    * math.prod(eqn.outvars[0].aval.shape)
                    * math.prod(lhs[i] for i in contracted)
                )
            elif name == "pallas_call":
                named = str(eqn.params.get("name") or eqn.params.get("name_and_src_info"))
                backward = "dkv" in named or "dq" in named
                queries = next(
                    each.aval.shape
                    for each in eqn.invars
                    if each.aval.shape[-2:] == (config.sequence_len, config.head_dim)
                )
                # of all rows and heads
                product = 2.0 * math.prod(queries[:-2]) * pairs * config.head_dim
                total += times * product * (5 if backward else 2)
            elif name in (CUDNN_FORWARD, CUDNN_BACKWARD):
                rows, length, heads, width = eqn.invars[0].aval.shape
                # with the query itself; `visible_pairs` means the keys before it
                window = eqn.params["sliding_window_length"]
                product = 2.0 * rows * heads * visible_pairs(length, window and window - 1) * width
                total += times * product * (2 if name == CUDNN_FORWARD else 5)
            elif name == "cond":
                branches, chosen = eqn.params["branches"], eqn.params.get("branches_platforms")
                if chosen:  # by platform; None is the default
                    branches = [
                        next(
                            branch
                            for branch, platforms in zip(branches, chosen, strict=True)
                            if platforms is None or platform in platforms
                        )
                    ]
                total += max(walk(branch.jaxpr, times) for branch in branches)
            else:
                inner = times * (eqn.params["length"] if name == "scan" else 1)
                if name == "shard_map":  # the shapes inside are one device's, along these axes
                    inner *= math.prod(
                        eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]
                    )
                total += sum(walk(each, inner) for each in _inner_jaxprs(eqn.params))
        return total

    return walk(jaxpr.jaxpr, 1.0)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(each, "eqns"):
                yield each
            elif hasattr(each, "jaxpr") and hasattr(each.jaxpr, "eqns"):
                yield each.jaxpr


# --------------------------------------------------------------------------------------------------


@dataclass
class HloCost:
    """Of one device and step."""

    # calls of those that are not XLA's, by name
    kernels: Counter[str] = field(default_factory=Counter)
    # Bytes read from HBM and written there, by kind of instruction.
    traffic: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    # bytes sent to other devices, by kind of collective
    sent: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)  # collectives executed, by kind
    largest: tuple[int, str] = (0, "")  # elements and shape of the largest array
    # loops whose number of rounds is not written in their condition; counted once
    unknown_loops: int = 0

    @property
    def hbm_bytes(self) -> float:
        return sum(self.traffic.values())


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: str  # its type
    argument: str  # between the parentheses
    operands: tuple[str, ...]
    attributes: str


def _matching(text: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]!r}")


def parse_hlo(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name, and the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            rest = line[match.end() :]
            end = _matching(rest, 0) if rest[0] == "(" else rest.index(" ")
            opcode, _, _ = rest[end:].strip().partition("(")
            opening = rest.index("(", end)
            closing = _matching(rest, opening)
            argument = rest[opening + 1 : closing - 1]
            operands = tuple(re.findall(r"%([\w.\-]+)", argument))
            current[match[1]] = Instruction(
                match[1], opcode, rest[:end], argument, operands, rest[closing:]
            )
    return computations, entry


def _sizes(result: str) -> Iterator[tuple[int, int, bool, str]]:
    """(elements, bytes, whether in HBM, text) of each array of a type. On TPUs S(n) is on the chip
    or the host, and T(8,128) the tiles that memory has, filled up: 64 of a row take the place of
    128.
    """
    for match in SHAPE.finditer(result):
        if match[1] in DTYPE_BYTES:
            sizes = [int(size) for size in match[2].split(",") if size]
            text, elements = match[0].partition("{")[0], math.prod(sizes)
            if tiled := re.match(r"([\d,]+):T\(([\d,]+)\)", match[3] or ""):
                for axis, tile in zip(
                    map(int, tiled[1].split(",")), map(int, reversed(tiled[2].split(",")))
                ):
                    sizes[axis] = -(-sizes[axis] // tile) * tile
            yield (
                elements,
                math.prod(sizes) * DTYPE_BYTES[match[1]],
                "S(" not in (match[3] or ""),
                text,
            )


def _hbm(result: str) -> int:
    return sum(size for _, size, in_hbm, _ in _sizes(result) if in_hbm)


def _named(role: str, instruction: Instruction) -> str:
    """The computation that an instruction calls in this role."""
    return next(re.finditer(rf"{role}=%?([\w.\-]+)", instruction.attributes))[1]


def _bytes(result: str) -> int:
    return sum(size for _, size, _, _ in _sizes(result))


def _group_size(attributes: str) -> int:
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2  # a permute has pairs


def hlo_cost(text: str) -> HloCost:
    """HBM traffic and collectives of an optimised module, loops multiplied out.

    Traffic is what instructions read and write outside of fusions, buffers that XLA keeps on the
    chip left out. A bound from below: each operand counts once, but products and kernels read some
    in several passes.
    """
    computations, entry = parse_hlo(text)
    cost = HloCost()
    # channels of collectives inside of fusions: their start, body and end repeat them
    fused: set[str] = set()

    def rounds(condition: str) -> int | None:
        """Of a counting loop: the largest integer its condition compares with."""
        return max(
            (
                int(each.argument)
                for each in computations[condition].values()
                if each.opcode == "constant" and each.argument.isdigit()
            ),
            default=None,
        )

    def called(each: Instruction) -> dict[str, Instruction]:
        return computations[_named("calls", each)]

    def touched(body: dict[str, Instruction], name: str, whole: int) -> tuple[int, int, int]:
        """Bytes of a fusion's parameter of `whole` bytes: read, part of a result that is it, and
        written into it.
        """
        read, in_place, written = 0, 0, 0
        for user in body.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                parts = touched(body, user.name, whole)
            elif user.opcode == "fusion":
                inner = called(user)
                number = str(user.operands.index(name))
                parts = touched(
                    inner,
                    next(
                        each.name
                        for each in inner.values()
                        if each.opcode == "parameter" and each.argument == number
                    ),
                    whole,
                )
            elif user.opcode in SLICES and user.operands[0] == name:
                part = _bytes(user.result)
                # of a slice perhaps a slice
                parts = touched(body, user.name, part)[0] or part, 0, 0
            elif user.opcode in UPDATES and user.operands[0] == name:
                parts = 0, whole, _bytes(body[user.operands[UPDATES[user.opcode]]].result)
            else:
                parts = whole, 0, 0
            read, in_place, written = read + parts[0], max(in_place, parts[1]), written + parts[2]
        return min(read, whole), in_place, written

    def fusion_bytes(call: Instruction, scope: dict[str, Instruction]) -> int:
        """What a fusion moves: slices of what it only slices, the updated part of what it updates
        in place.
        """
        body, total, in_place = called(call), 0, 0
        for parameter in [each for each in body.values() if each.opcode == "parameter"]:
            number = int(parameter.argument)
            operand = call.operands[number]
            whole = _hbm(scope[operand].result) if operand in scope else 0
            if not whole or operand in call.operands[:number]:
                continue
            read, updated, written = touched(body, parameter.name, whole)
            total, in_place = total + read + written, in_place + updated
        return total + max(_hbm(call.result) - in_place, 0)

    def kind_of(each: Instruction) -> str:
        if each.opcode == "fusion":
            inner = called(each).values()
            found = {kind_of(part) for part in inner if part.opcode == "fusion"} | {
                part.opcode for part in inner
            }
            return "products" if found & {"convolution", "dot", "products"} else "element-wise"
        if each.opcode in ("convolution", "dot"):
            return "products"
        if each.opcode == "custom-call":
            return "kernels"
        return (
            "copies"
            if each.opcode.removesuffix("-start") in ("copy", "reshape", "transpose")
            else "element-wise"
        )

    def count_sent(kind: str, size: float, group: int, times: float) -> None:
        cost.sent[kind] += times * size * SENT[kind](group)
        cost.calls[kind] += int(times)

    def walk(name: str, times: float) -> None:
        scope = computations[name]
        for each in scope.values():
            for elements, _, _, shape in _sizes(each.result):
                cost.largest = max(cost.largest, (elements, shape))
            base, finished = each.opcode.removesuffix("-start"), each.opcode.removesuffix("-done")
            if each.opcode == "while":
                condition, body = _named("condition", each), _named("body", each)
                known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', each.attributes)
                count = int(known[1]) if known else rounds(condition)
                cost.unknown_loops += count is None
                walk(body, times * (count or 1))
            elif each.opcode in ("call", "async-start", "conditional"):
                for inner in re.findall(
                    r"(?:to_apply|calls|_computation)=%?([\w.\-]+)", each.attributes
                ):
                    walk(inner, times)
            elif finished in SENT:
                start = each if each.opcode == finished else scope[each.operands[0]]
                count_sent(finished, _bytes(each.result), _group_size(start.attributes), times)
                read = sum(
                    _hbm(scope[operand].result) for operand in start.operands if operand in scope
                )
                cost.traffic["collectives"] += times * (read + _hbm(each.result))
            elif base in SENT:
                pass  # counted where it is done, whose result is the plain one
            elif each.opcode == "fusion":
                cost.traffic[kind_of(each)] += times * fusion_bytes(each, scope)
                for inner in called(each).values():
                    channel = re.search(r"channel_id=\d+", inner.attributes)
                    if inner.opcode in SENT and channel and channel[0] not in fused:
                        fused.add(channel[0])
                        group, scatter = (
                            _group_size(inner.attributes),
                            "all-reduce-scatter" in each.attributes,
                        )
                        kind = "reduce-scatter" if scatter else inner.opcode
                        count_sent(
                            kind, _bytes(inner.result) / (group if scatter else 1), group, times
                        )
            elif each.opcode in UPDATES:
                cost.traffic["element-wise"] += (
                    times * 2 * _bytes(scope[each.operands[UPDATES[each.opcode]]].result)
                )
            # the result of a start holds the whole operand, the slice and a counter
            elif base in ("slice", "dynamic-slice"):
                moved = [size for elements, size, _, _ in _sizes(each.result) if elements > 1]
                cost.traffic["copies"] += times * (
                    2 * _hbm(each.result) if base == each.opcode else min(moved, default=0)
                )
            elif (
                each.opcode not in FREE
                and not each.opcode.endswith("-done")
                and not FREE_CALLS.search(each.attributes)
            ):
                read = sum(
                    _hbm(scope[operand].result)
                    for operand in set(each.operands)
                    if operand in scope
                )
                # The result of a start holds what is written first, then what is read.
                written = (
                    _hbm(each.result)
                    if base == each.opcode
                    else _hbm(next(SHAPE.finditer(each.result))[0])
                )
                cost.traffic[kind_of(each)] += times * (read + written)
                if target := re.search(r'custom_call_target="([^"]+)"', each.attributes):
                    cost.kernels[target[1]] += int(times)

    walk(entry, 1.0)
    return cost
