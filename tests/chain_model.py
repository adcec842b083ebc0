"""A model that answers each token with one certain successor: a test can write its replies."""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.infer.engine import Engine
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import abstract_params
from nanochat_jax.tokenizer import SPECIAL_TOKENS


class ByteTokenizer:
    """A token for each byte, then the special tokens."""

    vocab_size = 256 + len(SPECIAL_TOKENS)
    bos_id = 256
    special_tokens = {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text, prepend=None, append=None):
        before, after = ([self.special_tokens[name]] if name else [] for name in (prepend, append))
        return [*before, *text.encode(), *after]

    def encode_special(self, name):
        return self.special_tokens[name]

    def decode_bytes(self, ids):
        return b"".join(bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids)


TOKENIZER = ByteTokenizer()
BOS, USER_START, USER_END, ASSISTANT_START, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(
    256, 265
)

CHAIN = GPTConfig.classic(
    1, vocab_size=TOKENIZER.vocab_size, sequence_len=96, n_embd=272, n_head=2, n_kv_head=2
)


def chain_params(*texts):
    """Parameters of a model that, from the first token of any of `texts`, says the rest and begins
    again.

    A text is a sequence of strings and special ids. The blocks are zero and add nothing, so that
    with one-hot embeddings the logits are a row of `lm_head`.
    """
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(CHAIN))
    head = np.zeros((272, TOKENIZER.vocab_size), np.float32)
    for text in texts:
        ids = [i for part in text for i in (part.encode() if isinstance(part, str) else [part])]
        for token, successor in zip(ids, ids[1:] + ids[:1], strict=True):
            if token not in (END, BOS):
                assert not head[token].any(), f"{token} has two successors"
                head[token, successor] = 10.0
    return params | {"wte": jnp.eye(272)[: TOKENIZER.vocab_size], "lm_head": jnp.asarray(head)}


def chain_engine(*texts, **options):
    options = {"num_slots": 3, "steps_per_dispatch": 5} | options
    return Engine(CHAIN, chain_params(*texts), TOKENIZER, **options)
