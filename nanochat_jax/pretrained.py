"""A trained model in three lines, for notebooks and scripts.

import nanochat_jax
model = nanochat_jax.load("sft")
model.generate("The capital of France is", max_tokens=16, temperature=0.0)
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Loaded, load_directory, load_model
from nanochat_jax.conversation import render_for_completion
from nanochat_jax.errors import NotFound
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.padding import bucket
from nanochat_jax.infer.request import NoTokenizer, Request
from nanochat_jax.interop.hf import read_hf
from nanochat_jax.interop.torch_checkpoint import Imported, read_checkpoint
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.model.sharding import make_mesh, param_shardings
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths, saved_steps
from nanochat_jax.tokenizer import Tokenizer


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _logits(params: Params, tokens: Array, *, config: GPTConfig, compute: Compute) -> Array:
    return unembed(params, forward(params, tokens, config, compute)[0], config=config)


@dataclass(frozen=True, eq=False)
class Model:
    """A model in memory.

    Attributes:
        config: its shape and architecture.
        params: the parameters, a nested dict of float32 arrays; matrices [in, out], equal layers
          stacked.
        tokenizer: None if the weights came without one; then only token ids go in and out.
        source: "base", "mid", "sft", "rl", or the directory it came from.
        step: of the training that made it.
        compute: the devices it is on, the dtype it computes in, and so on.
    """

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer | None
    source: str
    step: int
    compute: Compute

    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Softcapped logits, float32 [B, T, V], of tokens [B, T]: at [b, t] those of the token
        after t.

        Raises ValueError for another shape or an id outside of the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens must be integers [B, T], got {tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"ids must be in 0..{self.config.vocab_size - 1}, got "
                f"{tokens.min()}..{tokens.max()}"
            )
        rows, length = tokens.shape
        # Padding to the right changes nothing before it, and few lengths mean few compilations.
        padded = np.zeros((rows, bucket(length)), np.int32)
        padded[:, :length] = tokens
        return np.asarray(
            _logits(self.params, padded, config=self.config, compute=self.compute)[:, :length],
            np.float32,
        )

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 42,
        chat: bool = False,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 42,
        chat: bool = False,
    ) -> list[int]: ...
    def generate(self, prompt, *, max_tokens=256, temperature=1.0, top_k=0, seed=42, chat=False):
        """What follows a prompt, until the model ends it: text for a text, ids for ids; without
        the prompt.

        Args:
            prompt: text, after which the model goes on as in a document; or ids, taken as they are.
            max_tokens: most tokens to generate; less where the context ends.
            temperature: 0 takes the most likely token each time.
            top_k: keep the k most likely tokens; 0 or None keeps all.
            seed: the same seed gives the same tokens.
            chat: the text is a user's message, and the result the assistant's reply.

        Raises ValueError if the prompt is empty, does not fit the context, or has ids outside of
        the vocabulary.
        """
        tokens = self._prompt_ids(prompt, chat) if isinstance(prompt, str) else prompt
        request = Request(
            tuple(tokens),
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k or 0,
            seed=seed,
        )
        result = self._engine.generate([request])[0]
        return result.text if isinstance(prompt, str) else result.tokens

    def _prompt_ids(self, text: str, chat: bool) -> list[int]:
        if self.tokenizer is None:
            return NoTokenizer().encode(text)
        if not chat:
            return self.tokenizer.encode(text, prepend=self.tokenizer.bos_id)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        # cut nothing
        return render_for_completion(self.tokenizer, {"messages": messages}, max_tokens=sys.maxsize)

    @functools.cached_property
    def _engine(self) -> Engine:
        return Engine(
            self.config,
            self.params,
            self.tokenizer or NoTokenizer(),
            num_slots=1,
            compute=self.compute,
        )


def load_engine(
    paths: Paths,
    source: str,
    *,
    tag: str | None,
    step: int | None,
    dtype: str,
    mesh: Mesh | None = None,
    **options: Any,
) -> tuple[Engine, Loaded]:
    """An engine (`options` are its own) of a stage's model, and what else is known of that.

    The parameters in float32 are not kept: the engine has its own, in the dtype it computes with.
    """
    loaded = load_model(paths, source, tag=tag, step=step, mesh=mesh)
    engine = Engine(
        loaded.config,
        loaded.params,
        loaded.tokenizer,
        compute=Compute.on(mesh, dtype=dtype),
        **options,
    )
    return engine, dataclasses.replace(loaded, params={})


def load(
    source: str | Path = "sft",
    *,
    tag: str | None = None,
    step: int | None = None,
    dtype: str = "auto",
    mesh: str = "1x1",
    rotary_dtype: Literal["float32", "bfloat16"] | None = None,
) -> Model:
    """Load a trained model.

    Args:
        source: "base", "mid", "sft" or "rl": a stage's checkpoint under the base directory. Or a
            directory: one of ours (with steps in it), upstream's (`model_<step>.pt`), or Hugging
            Face's (`config.json`, `.safetensors`).
        tag: of a stage; default the largest `d<depth>`.
        step: default the newest.
        dtype: of the computation: "auto" is float32 on a CPU and bfloat16 elsewhere.
        mesh: devices as DxM.
        rotary_dtype: of the rotary tables, "float32" or "bfloat16"; default as the model was
          trained (see `read_foreign`).

    Raises `NotFound` (a FileNotFoundError) or `UsageError`, which say what to do.
    """
    devices = make_mesh(mesh)
    directory = Path(source).expanduser()
    found: Loaded | Imported
    if str(source) in CHECKPOINT_DIRS:
        found = load_model(Paths.from_env(), str(source), tag=tag, step=step, mesh=devices)
    elif not directory.is_dir():
        raise NotFound(
            f"{directory} is neither a directory nor one of the stages {', '.join(CHECKPOINT_DIRS)}"
        )
    elif saved_steps(directory):
        found = load_directory(directory, step=step, mesh=devices)
    else:
        found = read_foreign(directory, step=step)
    config, params = found.config, found.params
    if rotary_dtype is not None:
        config = dataclasses.replace(config, rotary_dtype=rotary_dtype)
    tokenizer = found.own_tokenizer if isinstance(found, Loaded) else found.tokenizer
    if isinstance(found, Imported):
        params = jax.device_put(jax.tree.map(jnp.asarray, params), param_shardings(config, devices))
    return Model(
        config, params, tokenizer, str(source), found.step, Compute.on(devices, dtype=dtype)
    )


def read_foreign(
    directory: Path,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    rotary_dtype: str | None = None,
) -> Imported:
    """Read a checkpoint of another kind than ours: nanochat's PyTorch files, or a Hugging Face
    directory.

    `rotary_dtype` of a classic model's tables is by default what the files' own code computes
    with: bfloat16 for nanochat's, float32 for transformers'.
    """
    if any(directory.glob("model_*.pt")):
        return read_checkpoint(directory, step=step, tokenizer=tokenizer, rotary_dtype=rotary_dtype)
    if (directory / "config.json").is_file():
        return read_hf(directory, tokenizer=tokenizer, rotary_dtype=rotary_dtype)
    raise NotFound(
        f"no model_<step>.pt and no config.json in {directory}: give the directory of a nanochat "
        "checkpoint "
        "or of a Hugging Face model"
    )
