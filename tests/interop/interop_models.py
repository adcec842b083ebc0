"""Small models of both architectures."""

import jax
import numpy as np

from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.tokenizer import Tokenizer

VOCABULARY = Tokenizer(
    {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b"\xe4\xb8": 258}
)
SHAPE = dict(n_embd=32, n_head=4, n_kv_head=2, vocab_size=VOCABULARY.vocab_size, sequence_len=64)
MODELS = {
    "classic": GPTConfig.classic(3, **SHAPE, rotary_dtype="bfloat16"),
    "modern": GPTConfig.modern(3, **SHAPE),
}


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(config)
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
