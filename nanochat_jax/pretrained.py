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
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Loaded, load_directory, load_model
from nanochat_jax.conversation import render_for_completion
from nanochat_jax.devices import EngineFlags
from nanochat_jax.errors import NotFound
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.padding import padded_length
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

P = TypeVar("P", str, list[int])


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _logits(params: Params, tokens: Array, *, config: GPTConfig, compute: Compute) -> Array:
    return unembed(params, forward(params, tokens, config, compute)[0], config=config)


@dataclass(frozen=True, eq=False)
class Model:
    """A model in memory.

    Attributes:
        params: the parameters, a nested dict of float32 arrays; matrices [in, out], layers stacked.
        tokenizer: None if the weights came without one; then prompts and replies are token ids.
        source: "base", "mid", "sft", "rl", or the directory it came from.
        step: its training step.
        compute: mesh, compute dtype, and so on.
    """

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer | None
    source: str
    step: int
    compute: Compute

    def logits(self, tokens: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return logits after the softcap, float32 [B, T, V], for the token after each of [B, T].

        Raises ValueError for another shape or an id outside the vocabulary.
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
        # Few lengths mean few compilations; padding on the right does not change the rest.
        padded = np.zeros((rows, padded_length(length)), np.int32)
        padded[:, :length] = tokens
        return np.asarray(
            _logits(self.params, padded, config=self.config, compute=self.compute)[:, :length],
            np.float32,
        )

    def generate(
        self,
        prompt: P,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = 0,
        seed: int = 42,
        chat: bool = False,
    ) -> P:
        """Continue a prompt until the model ends it. Returns the continuation.

        Args:
            prompt: text to continue as a document, or token ids; the result is of the same type.
            max_tokens: maximum number of new tokens; limited by the context.
            temperature: sampling temperature; 0 is greedy.
            top_k: keep the k most likely tokens; 0 or None keeps all.
            seed: the same seed gives the same tokens.
            chat: the text is a user's message, the result the assistant's reply.

        Raises ValueError if the prompt is empty, does not fit the context, or has ids outside the
        vocabulary.
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
    paths: Paths, source: str, flags: EngineFlags, *, mesh: Mesh | None = None, **options: Any
) -> tuple[Engine, Loaded]:
    """Return an engine with `options` for a stage's model, and the model without its parameters."""
    model = load_model(paths, source, tag=flags.model_tag, step=flags.step, mesh=mesh)
    compute = Compute.on(mesh, dtype=flags.dtype, cache_dtype=flags.cache_dtype)
    engine = Engine(model.config, model.params, model.tokenizer, compute=compute, **options)
    return engine, dataclasses.replace(model, params={})


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
        source: "base", "mid", "sft" or "rl": a stage's checkpoint in the base directory. Or a
            checkpoint directory: ours, upstream's (`model_<step>.pt`), or Hugging Face's
            (`config.json`, `.safetensors`).
        tag: a stage's model tag; default the largest `d<depth>`.
        step: default the newest.
        dtype: compute dtype; "auto" is bfloat16 where the device has it, else float32 (see
            `resolve_dtype`).
        mesh: devices as DxM.
        rotary_dtype: dtype of the rotary tables; default as in training (see `read_foreign`).

    Raises `NotFound` (a FileNotFoundError) or `UsageError`.
    """
    devices = make_mesh(mesh)
    directory = Path(source).expanduser()
    model: Loaded | Imported
    if str(source) in CHECKPOINT_DIRS:
        model = load_model(Paths.from_env(), str(source), tag=tag, step=step, mesh=devices)
    elif not directory.is_dir():
        stages = ", ".join(CHECKPOINT_DIRS)
        raise NotFound(f"{directory} is neither a directory nor one of the stages {stages}")
    elif saved_steps(directory):
        model = load_directory(directory, step=step, mesh=devices)
    else:
        model = read_foreign(directory, step=step)
    config, params = model.config, model.params
    if rotary_dtype is not None:
        config = dataclasses.replace(config, rotary_dtype=rotary_dtype)
    tokenizer = model.own_tokenizer if isinstance(model, Loaded) else model.tokenizer
    if isinstance(model, Imported):
        params = jax.device_put(jax.tree.map(jnp.asarray, params), param_shardings(config, devices))
    return Model(
        config, params, tokenizer, str(source), model.step, Compute.on(devices, dtype=dtype)
    )


def read_foreign(
    directory: Path,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    rotary_dtype: str | None = None,
) -> Imported:
    """Read a checkpoint of nanochat in PyTorch, or a Hugging Face directory.

    `rotary_dtype` applies to a classic model. The default is what the files' own code uses:
    bfloat16 for nanochat's, float32 for transformers'.
    """
    if any(directory.glob("model_*.pt")):
        return read_checkpoint(directory, step=step, tokenizer=tokenizer, rotary_dtype=rotary_dtype)
    if (directory / "config.json").is_file():
        return read_hf(directory, tokenizer=tokenizer, rotary_dtype=rotary_dtype)
    raise NotFound(
        f"no model_<step>.pt and no config.json in {directory}: give the directory of a nanochat "
        "checkpoint or of a Hugging Face model"
    )
