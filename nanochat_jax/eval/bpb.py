"""Held-out loss in nats per target token and in bits per byte.

Bits per byte does not depend on the vocabulary.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.data.loader import Loader, pretraining_loader
from nanochat_jax.errors import UsageError
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.loss import Batch, token_nll
from nanochat_jax.model.sharding import data_size, spread_rows
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import Paths
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    bpb: float  # bits per byte; infinite if there are no bytes
    loss: float  # nats per target token


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _sums(
    params: Params, batch: Batch, token_bytes: Array, *, config: GPTConfig, compute: Compute
) -> tuple[Array, ...]:
    total, nll = token_nll(params, batch, config, compute)
    targets = batch.targets
    num_bytes = jnp.where(targets >= 0, token_bytes[jnp.maximum(targets, 0)], 0)
    return jnp.where(num_bytes > 0, nll, 0.0).sum(), num_bytes.sum(), total, (targets >= 0).sum()


def held_out_loss(
    params: Params,
    batches: Iterator[Mapping[str, np.ndarray]],
    steps: int,
    *,
    config: GPTConfig,
    token_bytes: np.ndarray,
    compute: Compute,
) -> HeldOut:
    """Loss over `steps` batches of inputs and targets [B, T]; negative targets are ignored.

    Every process reads all rows, so the result does not depend on the number of processes. Bits per
    byte is the nats of text targets over ln 2 times their bytes; special tokens (0 bytes) do not
    count.
    """
    sums, mesh = [], compute.mesh
    assert mesh is not None
    for _ in range(steps):
        batch = next(batches)
        rows = Batch(*(spread_rows(mesh, batch[name]) for name in ("inputs", "targets")))
        sums.append(_sums(params, rows, token_bytes, config=config, compute=compute))
    nats, num_bytes, total, count = np.array(jax.device_get(sums), np.float64).sum(axis=0).tolist()
    return HeldOut(
        bpb=nats / (math.log(2) * num_bytes) if num_bytes else math.inf, loss=total / max(count, 1)
    )


def held_out_evaluation(
    validation: Loader, steps: int, *, config: GPTConfig, tokenizer: Tokenizer, compute: Compute
) -> Callable[[Params], HeldOut]:
    """`held_out_loss` as a function of the parameters, over the same batches each time."""
    token_bytes = tokenizer.token_bytes()

    def evaluate(params: Params) -> HeldOut:
        figures = held_out_loss(
            params, validation, steps, config=config, token_bytes=token_bytes, compute=compute
        )
        validation.reset()
        return figures

    return evaluate


def corpus_bits_per_byte(
    loaded: Loaded, paths: Paths, *, device_batch_size: int, split_tokens: int, compute: Compute
) -> dict[str, float]:
    """`train_bpb` and `val_bpb` of a base model over the first `split_tokens` tokens per split."""
    model, tokenizer = loaded.config, loaded.tokenizer
    assert compute.mesh is not None
    rows = device_batch_size * data_size(compute.mesh)
    steps = split_tokens // (rows * model.sequence_len)
    if steps < 1:
        raise UsageError(
            f"`split_tokens={split_tokens}` is less than one batch of {rows * model.sequence_len} "
            "tokens: raise it, or lower `device_batch_size`"
        )
    # imported weights do not record their corpus
    corpus = loaded.meta["data"] or paths.find_data()
    token_bytes = tokenizer.token_bytes(loaded.meta.get("byte_rule", "raw"))
    results = {}
    for split in ("train", "val"):
        batches = pretraining_loader(
            paths.data(corpus),
            tokenizer,
            split=split,
            batch_size=rows,
            sequence_len=model.sequence_len,
            packing=loaded.meta["packing"],
            num_shards=1,
        )
        figures = held_out_loss(
            loaded.params, batches, steps, config=model, token_bytes=token_bytes, compute=compute
        )
        batches.close()
        results[f"{split}_bpb"] = figures.bpb
        tokens = steps * rows * model.sequence_len
        log.info(f"{split}: {figures.bpb:.4f} bits per byte over {tokens:,} tokens")
    return results
