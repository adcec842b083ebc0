"""Random parameters: initial ones predict nothing, as projections and unembedding are about 0."""

import jax
import numpy as np

from nanochat_jax.model.weights import abstract_params


def random_params(config, scale=0.3, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32), abstract_params(config)
    )
