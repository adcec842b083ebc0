"""Held-out loss: nats per supervised token, and bits per byte, which do not depend on the vocabulary."""

import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.cli import UsageError
from nanochat_jax.config import GPTConfig
from nanochat_jax.data.loader import pretraining_loader
from nanochat_jax.gpt import Params, forward
from nanochat_jax.kernels import forward_options
from nanochat_jax.loss import chunk_length, cross_entropy
from nanochat_jax.paths import Paths
from nanochat_jax.sharding import data_size, spread_rows

log = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    bpb: float  # bits per byte; infinite without any byte
    loss: float  # nats per supervised token


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _sums(params: Params, inputs: Array, targets: Array, token_bytes: Array, *, config: GPTConfig, dtype: Any, mesh: Mesh
          ) -> tuple[Array, ...]:
    how = forward_options(config, mesh, dtype=dtype, length=inputs.shape[1])
    hidden, _ = forward(params, inputs, config=config, compute_dtype=dtype, **how)
    chunk = chunk_length(inputs.shape[0], inputs.shape[1], config.vocab_size, mesh.size)
    weight = params["lm_head"][:, : config.vocab_size]
    total, nll = cross_entropy(hidden, weight, targets, jnp.ones(targets.shape), config.softcap, chunk)
    num_bytes = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    return jnp.where(num_bytes > 0, nll, 0.0).sum(), num_bytes.sum(), total, (targets >= 0).sum()


def held_out_loss(params: Params, batches: Iterator[Mapping[str, np.ndarray]], steps: int, *, config: GPTConfig,
                  token_bytes: np.ndarray, mesh: Mesh, dtype: Any) -> HeldOut:
    """Loss over `steps` batches: inputs and targets [B, T], negative targets ignored. Every process reads all the rows,
    so that the figure does not depend on how many there are.

    Bits per byte: nats of the targets that stand for text over ln 2 times the bytes they stand for; special tokens
    (0 bytes) count for nothing.
    """
    sums = []
    for _ in range(steps):
        batch = next(batches)
        inputs, targets = (spread_rows(mesh, batch[name]) for name in ("inputs", "targets"))
        sums.append(_sums(params, inputs, targets, token_bytes, config=config, dtype=dtype, mesh=mesh))
    nats, num_bytes, total, count = np.array(jax.device_get(sums), np.float64).sum(axis=0).tolist()
    return HeldOut(bpb=nats / (math.log(2) * num_bytes) if num_bytes else math.inf, loss=total / max(count, 1))


def corpus_bits_per_byte(loaded: Loaded, paths: Paths, *, device_batch_size: int, split_tokens: int, mesh: Mesh, dtype: Any
                         ) -> dict[str, float]:
    """`train_bpb` and `val_bpb` of a base model over the first `split_tokens` tokens of each split of its corpus."""
    model, tokenizer = loaded.config, loaded.tokenizer
    rows = device_batch_size * data_size(mesh)
    steps = split_tokens // (rows * model.sequence_len)
    if steps < 1:
        raise UsageError(f"--split-tokens {split_tokens} is less than one batch of {rows * model.sequence_len} tokens: "
                         "give more, or a smaller --device-batch-size")
    corpus = loaded.meta["data"] or paths.find_data()  # imported weights do not say what they were trained on
    token_bytes = tokenizer.token_bytes(loaded.meta.get("byte_rule", "raw"))
    results = {}
    for split in ("train", "val"):
        batches = pretraining_loader(
            paths.data(corpus), tokenizer, split=split, batch_size=rows, sequence_len=model.sequence_len,
            packing=loaded.meta["packing"], num_shards=1,
        )
        figures = held_out_loss(loaded.params, batches, steps, config=model, token_bytes=token_bytes,
                                mesh=mesh, dtype=dtype)
        batches.close()
        results[f"{split}_bpb"] = figures.bpb
        log.info("%s: %.4f bits per byte over %s tokens", split, figures.bpb, f"{steps * rows * model.sequence_len:,}")
    return results
