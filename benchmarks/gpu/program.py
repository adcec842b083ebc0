"""What the benchmark measures: the package's train step and decode program.

All use of nanochat_jax by the benchmark is here and in `checks.attention`.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.gpu.plan import Size
from nanochat_jax.infer import decode
from nanochat_jax.infer.decode import DecodeConfig
from nanochat_jax.metrics import peak_bandwidth, peak_flops, peak_memory_bytes
from nanochat_jax.model.compute import Compute, resolve_dtype
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import Batch
from nanochat_jax.model.recipe import MODERN, derive_recipe
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.model.size import flops_per_token, num_scaling_params
from nanochat_jax.model.weights import init_params
from nanochat_jax.train.memory import compile_step, estimate_memory, memory_limit
from nanochat_jax.train.optim import (
    CLASSIC_RATES,
    OptimizerConfig,
    Schedules,
    constant,
    cosine_decay,
    make_optimizer,
    modern_momentum,
    trapezoid,
)
from nanochat_jax.train.step import (
    batch_shape,
    init_state,
    make_train_step,
    shard_batch,
    state_shardings,
)

__all__ = [
    "Decoding",
    "Training",
    "memory_limit",
    "peak_bandwidth",
    "peak_flops",
    "peak_memory_bytes",
]


def modern_config(depth: int, size: Size, sequence: int | None = None) -> GPTConfig:
    """The model that `speedrun` trains: windows SSSL, value embeddings, smear, lambdas."""
    return GPTConfig.modern(depth, sequence_len=sequence or size.sequence, vocab_size=size.vocab)


def modern_optimizer(config: GPTConfig, compute: Compute) -> Any:
    """The optimizer that scripts.base_train makes for a modern model without flags."""
    reference = GPTConfig.modern(12, sequence_len=config.sequence_len, vocab_size=config.vocab_size)
    recipe = derive_recipe(config, reference=reference, weight_decay=MODERN.weight_decay)
    steps = recipe.num_iterations
    schedules = Schedules(
        lr_scale=recipe.lr_scale,
        lr_multiplier=trapezoid(
            steps,
            warmup=MODERN.warmup_steps,
            warmdown_ratio=MODERN.warmdown_ratio,
            final_fraction=MODERN.final_lr_frac,
        ),
        momentum=modern_momentum(steps, MODERN.warmdown_ratio),
        weight_decay=cosine_decay(recipe.weight_decay, steps),
    )
    return make_optimizer(config, OptimizerConfig(), schedules, compute)


def random_tokens(rows: int, config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [rows, T] of random tokens."""
    rng = np.random.default_rng(0)
    shape = (rows, config.sequence_len + 1)
    tokens = rng.integers(0, config.vocab_size, shape, dtype=np.int32)
    return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class Training:
    """A train step of `accumulation` micro-batches of `rows` rows on one device.

    Attributes:
        optimizer: default: the modern recipe's.
        device: default: the first device.
        dtype_name: compute dtype; "auto" as in training.
    """

    config: GPTConfig
    rows: int
    accumulation: int
    optimizer: Any = None
    device: Any = None
    dtype_name: str = "auto"

    @property
    def mesh(self) -> Any:
        return make_mesh("1x1", [self.device or jax.devices()[0]])

    @property
    def compute(self) -> Compute:
        return Compute.on(self.mesh, dtype=self.dtype_name)

    @property
    def dtype(self) -> Any:
        return self.compute.dtype

    @property
    def shape(self) -> Any:
        tokens = self.rows * self.accumulation * self.config.sequence_len
        return batch_shape(tokens, self.rows, self.config.sequence_len, self.mesh)

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.shape.tokens

    def _optimizer(self) -> Any:
        return self.optimizer or modern_optimizer(self.config, self.compute)

    def new_state(self) -> Any:
        """Fresh parameters and optimizer state, the same each time."""
        state, _ = init_state(self.config, self._optimizer(), self.mesh, fsdp=False, seed=0)
        return state

    def make_step(self) -> Any:
        """The jitted step, not compiled yet: (state, batch) -> (state, metrics)."""
        optimizer = self._optimizer()
        _, shardings = state_shardings(self.config, optimizer, self.mesh, fsdp=False)
        return make_train_step(self.config, optimizer, self.compute, shardings)

    def compile(self, state: Any) -> tuple[Any, int, float]:
        """The compiled step, the bytes that it needs, and the seconds that compiling took.

        Raises `UsageError` if it needs more memory than the device has.
        """
        began = time.perf_counter()
        compiled, needed = compile_step(self.make_step(), state, self.shape, self.mesh)
        return compiled, needed, time.perf_counter() - began

    def batch(self) -> Batch:
        rows = Batch(*random_tokens(self.rows * self.accumulation, self.config))
        return shard_batch(rows, self.shape, self.mesh)

    def estimated_bytes(self) -> float:
        """What `--device-batch-size` and `--remat` are chosen by."""
        return estimate_memory(self.config, self.rows, data=1, remat="none", fsdp=False, gpu=True)

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilization of a step, None where the device's peak is unknown."""
        peak = peak_flops(self.mesh.devices.flat[0])
        return peak and flops_per_token(self.config) * self.tokens / seconds / peak


def classic_training(depth: int, rows: int, size: Size) -> Training:
    """One batch of the model and optimizer of torch_reference.py."""
    config = GPTConfig.classic(depth, sequence_len=size.sequence, vocab_size=size.vocab)
    rates = OptimizerConfig(**(CLASSIC_RATES | {"grad_clip": 0.0}))
    schedules = Schedules(lr_multiplier=constant(1.0), momentum=constant(0.95))
    optimizer = make_optimizer(config, rates, schedules, Compute.on(make_mesh("1x1")))
    return Training(config, rows, 1, optimizer)


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding of `tokens` tokens for each of `rows` sequences at the end of the context."""

    config: GPTConfig
    rows: int
    tokens: int

    @property
    def dtype(self) -> Any:
        return resolve_dtype("auto")

    def _static(self) -> DecodeConfig:
        # No token has the id `vocab_size`, so no row pauses.
        return DecodeConfig(self.config, Compute.on(None), python_end=self.config.vocab_size)

    def new_params(self) -> Any:
        @jax.jit
        def make(key: Any) -> Any:
            params = init_params(self.config, key)
            return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

        compute = self._static().compute
        return decode.split_layers(make(jax.random.key(0)), config=self.config, compute=compute)

    def new_slots(self) -> Any:
        return decode.new_slots(
            rows=self.rows, length=self.config.sequence_len, static=self._static()
        )

    def compile(self, params: Any, slots: Any) -> tuple[Any, float]:
        """`run(params, slots) -> (slots, emitted)`, and the seconds that compiling took."""
        length = self.config.sequence_len - self.tokens
        dispatch = decode.greedy_inputs(self.rows, length=length, steps=self.tokens)
        dispatch = jax.device_put(dispatch)
        began = time.perf_counter()
        lowered = decode.decode.lower(params, slots, dispatch, static=self._static())
        compiled = lowered.compile()

        def run(params: Any, slots: Any) -> tuple[Any, Any]:
            slots, emitted, _ = compiled(params, slots, dispatch)
            return slots, emitted

        return run, time.perf_counter() - began

    def bytes_per_token(self) -> dict[str, int]:
        """Bytes that one step for all rows must read: weights, and keys and values in reach.

        `cache_windowed` counts the keys that each layer's window needs, `cache_full` all of them.
        """
        config, width = self.config, self.dtype.itemsize
        length = config.sequence_len - self.tokens // 2
        keys = sum(
            length if window is None else min(window + 1, length) for window in config.windows
        )
        entry = 2 * config.n_kv_head * config.head_dim * width * self.rows
        return {
            "weights": num_scaling_params(config) * width,
            "cache_windowed": entry * keys,
            "cache_full": entry * config.n_layer * config.sequence_len,
        }
