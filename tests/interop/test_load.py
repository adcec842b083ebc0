"""`nanochat_jax.load` of a foreign checkpoint."""

import subprocess
import sys

import numpy as np
import pytest
from interop_models import VOCABULARY

import nanochat_jax


def test_a_model_in_three_lines(exported, model):
    config, params = model
    loaded = nanochat_jax.load(exported)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 37))
    logits = loaded.logits(tokens)
    assert (logits.dtype, logits.shape) == (np.float32, (2, 37, config.vocab_size))
    np.testing.assert_allclose(loaded.logits(tokens[:1, :20]), logits[:1, :20], atol=1e-4)
    ids = loaded.generate(tokens[0], max_tokens=8, temperature=0.0)
    both = [[*tokens[0], *ids]]
    assert loaded.logits(both)[0, 36:-1].argmax(-1).tolist() == ids
    drawn = [loaded.generate(tokens[0], max_tokens=8, seed=5) for _ in range(2)]
    assert drawn[0] == drawn[1]
    text = loaded.generate("the cat", max_tokens=8, temperature=0.0)
    prompt = VOCABULARY.encode("the cat", prepend="<|bos|>")
    ids = loaded.generate(prompt, max_tokens=8, temperature=0.0)
    assert isinstance(text, str) and VOCABULARY.decode(ids).startswith(text)
    for bad in ([1, 2, 3], [[0.5]], [[]], [[9999]], [[-1]]):
        with pytest.raises(ValueError, match="tokens must be integers|ids must be in"):
            loaded.logits(bad)


def test_importing_the_package_does_not_import_jax():
    code = "import sys, nanochat_jax; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
