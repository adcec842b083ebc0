"""Cost of a compiled step: FLOPs from its jaxpr, HBM traffic and collectives from optimized HLO.

XLA's own `cost_analysis` counts the body of a loop once and a Pallas kernel as zero. This module
counts both in full.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.kernels import CUDNN_BACKWARD, CUDNN_FORWARD
from tpu.hlo import (
    Computation,
    Instruction,
    arrays,
    first_hbm_bytes,
    group_size,
    hbm_bytes,
    parse_hlo,
    rounds,
    total_bytes,
)

# Bytes that a device sends, as a multiple of the result's bytes, in a group of n devices.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
# Instructions and custom calls that move no data.
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
}
FREE_CALLS = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"'
)
SLICES = {"dynamic-slice", "slice", "gather"}
# In-place updates of operand 0: the index of the operand that is written into it.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def visible_pairs(length: int, window: int | None) -> int:
    """Number of (query, key) pairs of causal attention over one row with this window.

    `window` is the number of keys before the query; None: all of them.
    """
    span = length if window is None else min(window + 1, length)
    return span * (span + 1) // 2 + (length - span) * span


def jaxpr_flops(
    jaxpr: Any, config: GPTConfig, *, platform: str, low_precision: bool = False
) -> float:
    """FLOPs of the matmuls of a traced step over all devices, recomputation included.

    `platform` is "cpu", "tpu" or "cuda". A fused attention kernel counts 2 matmuls in the forward
    pass and 5 in the backward pass, for the pairs that its mask leaves. For a Pallas kernel, the
    number of pairs is averaged over the layers. `low_precision`: only matmuls with operands of one
    byte.
    """
    return _FlopCounter(config, platform, low_precision).total(jaxpr.jaxpr)


class _FlopCounter:
    def __init__(self, config: GPTConfig, platform: str, low_precision: bool) -> None:
        self.config, self.platform, self.low_precision = config, platform, low_precision
        pairs = sum(visible_pairs(config.sequence_len, window) for window in config.windows)
        self.pairs = pairs / config.n_layer

    def total(self, jaxpr: Any) -> float:
        return sum((self._equation(eqn) for eqn in jaxpr.eqns), 0.0)

    def _equation(self, eqn: Any) -> float:
        name = eqn.primitive.name
        if name == "dot_general":
            counts = not self.low_precision or eqn.invars[0].aval.dtype.itemsize == 1
            return _matmul_flops(eqn) if counts else 0.0
        if name == "pallas_call":
            return 0.0 if self.low_precision else self._pallas_flops(eqn)
        if name in (CUDNN_FORWARD, CUDNN_BACKWARD):
            return 0.0 if self.low_precision else _cudnn_flops(eqn)
        if name == "cond":
            return max(self.total(branch.jaxpr) for branch in self._branches(eqn.params))
        return _repeats(eqn) * sum(self.total(inner) for inner in _inner_jaxprs(eqn.params))

    def _pallas_flops(self, eqn: Any) -> float:
        name = str(eqn.params.get("name") or eqn.params.get("name_and_src_info"))
        backward = "dkv" in name or "dq" in name
        rows_and_heads = next(
            operand.aval.shape[:-2]
            for operand in eqn.invars
            if operand.aval.shape[-2:] == (self.config.sequence_len, self.config.head_dim)
        )
        matmul = 2.0 * math.prod(rows_and_heads) * self.pairs * self.config.head_dim
        return matmul * (5 if backward else 2)

    def _branches(self, params: dict[str, Any]) -> list[Any]:
        """The branches of a `cond` that can run. A choice by platform has only one."""
        branches, platforms = params["branches"], params.get("branches_platforms")
        if not platforms:
            return branches
        return [
            next(
                branch
                for branch, names in zip(branches, platforms, strict=True)
                if names is None or self.platform in names  # None is the default branch
            )
        ]


def _matmul_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _cudnn_flops(eqn: Any) -> float:
    rows, length, heads, width = eqn.invars[0].aval.shape
    # cuDNN's window includes the query itself; that of `visible_pairs` does not.
    window = eqn.params["sliding_window_length"]
    matmul = 2.0 * rows * heads * visible_pairs(length, window and window - 1) * width
    return matmul * (2 if eqn.primitive.name == CUDNN_FORWARD else 5)


def _repeats(eqn: Any) -> int:
    """How often the inner jaxprs of an equation run, over all devices."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":  # shapes inside are those of one device
        return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    return 1


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns"):
                yield part
            elif hasattr(part, "jaxpr") and hasattr(part.jaxpr, "eqns"):
                yield part.jaxpr


@dataclass
class HloCost:
    """Cost of one step on one device."""

    kernels: Counter[str] = field(default_factory=Counter)  # custom calls executed, by target
    # Bytes read from and written to HBM, by kind of instruction.
    traffic: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: Counter = field(default_factory=Counter)  # bytes sent to other devices, by collective
    calls: Counter = field(default_factory=Counter)  # collectives executed, by kind
    network: float = 0.0  # bytes sent to other TPU slices
    transfers: int = 0  # sends to other TPU slices
    largest: tuple[int, str] = (0, "")  # elements and shape of the largest array
    low_precision: int = 0  # matmuls executed with float8 or int8 operands
    unknown_loops: int = 0  # loops without a constant trip count; their bodies are counted once

    @property
    def hbm_bytes(self) -> float:
        return sum(self.traffic.values())


def hlo_cost(text: str) -> HloCost:
    """HBM traffic and collectives of an optimized module. Loop bodies count once per iteration.

    Traffic is what instructions outside of fusions read and write, without the buffers that XLA
    keeps on the chip. It is a lower bound: each operand counts once, but matmuls and kernels read
    some operands in several passes.
    """
    computations, entry = parse_hlo(text)
    counter = _CostCounter(computations)
    counter.count(entry, 1.0)
    return counter.cost


class _CostCounter:
    """Adds up the cost of computations. `times` is how often an instruction is executed."""

    def __init__(self, computations: dict[str, Computation]) -> None:
        self.computations = computations
        self.cost = HloCost()
        # Channels of collectives inside of fusions. The start, body and end repeat a channel.
        self.fused_channels: set[str] = set()

    def count(self, name: str, times: float) -> None:
        """Add the cost of a computation."""
        scope = self.computations[name]
        for op in scope.values():
            for array in arrays(op.result):
                self.cost.largest = max(self.cost.largest, (array.elements, array.shape))
            self.cost.low_precision += int(times) * _is_low_precision(op, scope)
            COUNTERS.get(op.opcode, _CostCounter._other)(self, op, scope, times)

    def _loop(self, op: Instruction, scope: Computation, times: float) -> None:
        count = rounds(op, self.computations)
        self.cost.unknown_loops += count is None
        self.count(op.called("body"), times * (count or 1))

    def _call(self, op: Instruction, scope: Computation, times: float) -> None:
        for name in re.findall(r"(?:to_apply|calls|_computation)=%?([\w.\-]+)", op.attributes):
            self.count(name, times)

    def _collective(self, op: Instruction, scope: Computation, times: float) -> None:
        kind = op.opcode.removesuffix("-done")
        start = op if op.opcode == kind else scope[op.operands[0]]
        self._send(kind, total_bytes(op.result), group_size(start.attributes), times)
        moved = _operand_bytes(start.operands, scope) + hbm_bytes(op.result)
        self.cost.traffic["collectives"] += times * moved

    def _send(self, kind: str, size: float, group: int, times: float) -> None:
        self.cost.sent[kind] += times * size * SENT[kind](group)
        self.cost.calls[kind] += int(times)

    def _to_slices(self, op: Instruction, scope: Computation, times: float) -> None:
        # libtpu splits a collective over several slices: within one, and between them by the hosts.
        if "xla_megascale_runtime" in op.attributes:
            self.cost.network += times * total_bytes(scope[op.operands[0]].result)
            self.cost.transfers += int(times)
        self.cost.traffic["collectives"] += times * _operand_bytes(op.operands, scope)

    def _fusion(self, op: Instruction, scope: Computation, times: float) -> None:
        moved = _fusion_bytes(self.computations, op, scope)
        self.cost.traffic[_kind_of(self.computations, op)] += times * moved
        scatter = "all-reduce-scatter" in op.attributes
        self.cost.low_precision += int(times) * _low_precision_inside(self.computations, op)
        for inner in self.computations[op.called("calls")].values():
            channel = re.search(r"channel_id=\d+", inner.attributes)
            if inner.opcode not in SENT or not channel or channel[0] in self.fused_channels:
                continue
            self.fused_channels.add(channel[0])
            group, size = group_size(inner.attributes), total_bytes(inner.result)
            if scatter:
                self._send("reduce-scatter", size / group, group, times)
            else:
                self._send(inner.opcode, size, group, times)

    def _update(self, op: Instruction, scope: Computation, times: float) -> None:
        written = total_bytes(scope[op.operands[UPDATES[op.opcode]]].result)
        self.cost.traffic["element-wise"] += times * 2 * written

    def _slice(self, op: Instruction, scope: Computation, times: float) -> None:
        self.cost.traffic["copies"] += times * 2 * hbm_bytes(op.result)

    def _slice_start(self, op: Instruction, scope: Computation, times: float) -> None:
        # The result holds the complete operand, the slice and a scalar counter.
        sizes = [array.bytes for array in arrays(op.result) if array.elements > 1]
        self.cost.traffic["copies"] += times * min(sizes, default=0)

    def _other(self, op: Instruction, scope: Computation, times: float) -> None:
        """An instruction that reads its operands and writes its result, or moves nothing."""
        if op.opcode in FREE or op.opcode.endswith("-done") or FREE_CALLS.search(op.attributes):
            return
        # The result of a `-start` holds first what is written, then what is read.
        written = (first_hbm_bytes if op.opcode.endswith("-start") else hbm_bytes)(op.result)
        moved = _operand_bytes(set(op.operands), scope) + written
        self.cost.traffic[_kind_of(self.computations, op)] += times * moved
        if target := re.search(r'custom_call_target="([^"]+)"', op.attributes):
            self.cost.kernels[target[1]] += int(times)


# The method that counts an instruction, by opcode; `_other` counts all others.
COUNTERS: dict[str, Callable[[_CostCounter, Instruction, Computation, float], None]] = {
    "while": _CostCounter._loop,
    "call": _CostCounter._call,
    "async-start": _CostCounter._call,
    "conditional": _CostCounter._call,
    "fusion": _CostCounter._fusion,
    "send": _CostCounter._to_slices,
    "slice": _CostCounter._slice,
    "dynamic-slice": _CostCounter._slice,
    "slice-start": _CostCounter._slice_start,
    "dynamic-slice-start": _CostCounter._slice_start,
    **dict.fromkeys(UPDATES, _CostCounter._update),
    **dict.fromkeys(SENT, _CostCounter._collective),
    **dict.fromkeys((f"{kind}-done" for kind in SENT), _CostCounter._collective),
    **dict.fromkeys((f"{kind}-start" for kind in SENT), lambda *_: None),  # `-done` counts
}


def _is_low_precision(op: Instruction, scope: Computation) -> bool:
    """Whether an instruction is a matmul with operands in float8 or int8."""
    matmul = op.opcode in ("dot", "convolution") or '"__cublas$lt$matmul' in op.attributes
    if not matmul or len(op.operands) < 2:
        return False
    operands = [scope[name].result for name in op.operands[:2] if name in scope]
    return len(operands) == 2 and all(re.match(r"(f8\w+|s8)\[", text) for text in operands)


def _low_precision_inside(computations: dict[str, Computation], fusion: Instruction) -> int:
    """Number of low-precision matmuls in a fusion, and in fusions inside of it."""
    body = computations[fusion.called("calls")]
    return sum(
        _low_precision_inside(computations, op)
        if op.opcode == "fusion"
        else _is_low_precision(op, body)
        for op in body.values()
    )


def _operand_bytes(operands: Iterable[str], scope: Computation) -> int:
    return sum(hbm_bytes(scope[name].result) for name in operands if name in scope)


def _kind_of(computations: dict[str, Computation], op: Instruction) -> str:
    """The kind of an instruction, as `HloCost.traffic` names it."""
    if op.opcode == "fusion":
        inner = computations[op.called("calls")].values()
        kinds = {_kind_of(computations, part) for part in inner}
        return "products" if "products" in kinds else "element-wise"
    if op.opcode in ("convolution", "dot"):
        return "products"
    if op.opcode == "custom-call":
        return "kernels"
    copy = op.opcode.removesuffix("-start") in ("copy", "reshape", "transpose")
    return "copies" if copy else "element-wise"


@dataclass(frozen=True)
class _Use:
    """Bytes of a fusion's parameter that the fusion touches."""

    read: int = 0
    in_place: int = 0  # the part of the result that is this parameter, updated
    written: int = 0  # bytes written into the parameter


def _fusion_bytes(
    computations: dict[str, Computation], call: Instruction, scope: Computation
) -> int:
    """Bytes that a fusion reads and writes.

    Of a parameter that it only slices, the slices count. Of a parameter that it updates in place,
    the updated part counts.
    """
    body, total, in_place = computations[call.called("calls")], 0, 0
    for parameter in body.values():
        if parameter.opcode != "parameter":
            continue
        number = int(parameter.argument)
        operand = call.operands[number]
        size = hbm_bytes(scope[operand].result) if operand in scope else 0
        if not size or operand in call.operands[:number]:
            continue
        use = _use_of(computations, body, parameter.name, size)
        total, in_place = total + use.read + use.written, in_place + use.in_place
    return total + max(hbm_bytes(call.result) - in_place, 0)


def _use_of(computations: dict[str, Computation], body: Computation, name: str, size: int) -> _Use:
    """How the instructions of `body` use the value `name` of `size` bytes."""
    uses = [
        _use_by(computations, body, user, name, size)
        for user in body.values()
        if name in user.operands
    ]
    return _Use(
        min(sum(use.read for use in uses), size),
        max((use.in_place for use in uses), default=0),
        sum(use.written for use in uses),
    )


def _use_by(
    computations: dict[str, Computation], body: Computation, user: Instruction, name: str, size: int
) -> _Use:
    """How one instruction of `body` uses the value `name` of `size` bytes."""
    if user.opcode == "bitcast":
        return _use_of(computations, body, user.name, size)
    if user.opcode == "fusion":
        inner = computations[user.called("calls")]
        return _use_of(computations, inner, _parameter(inner, user.operands.index(name)), size)
    if user.opcode in SLICES and user.operands[0] == name:
        part = total_bytes(user.result)
        # The slice may be sliced again.
        return _Use(read=_use_of(computations, body, user.name, part).read or part)
    if user.opcode in UPDATES and user.operands[0] == name:
        update = body[user.operands[UPDATES[user.opcode]]]
        return _Use(in_place=size, written=total_bytes(update.result))
    return _Use(read=size)


def _parameter(computation: Computation, number: int) -> str:
    """Name of a computation's parameter."""
    return next(
        op.name
        for op in computation.values()
        if op.opcode == "parameter" and op.argument == str(number)
    )
