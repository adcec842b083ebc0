"""Checkpoints with Orbax: parameters, optimizer, data position and metadata in one atomic step.

    <source>_checkpoints/<tag>/<step>/{params,optimizer,state}    metrics.jsonl is next to the steps
                                                                  imported weights: no `optimizer`

Each step has checksums of its content. If a step is damaged, a warning is logged and the previous
one is loaded; a resumed run renames it to `damaged-<step>`. Only `keep` and `--fresh` delete steps.
"""

from nanochat_jax.checkpoint.load import (
    Loaded,
    find_model,
    keep_tokenizer,
    load_directory,
    load_model,
    load_optimizer,
)
from nanochat_jax.checkpoint.locking import claim_directory, lock_tag
from nanochat_jax.checkpoint.manager import Checkpoints, Restored
