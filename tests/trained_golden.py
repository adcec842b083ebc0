"""The small checkpoints that upstream trained, read without torch: the archive's tensors and the pickled vocabulary,
with unpicklers that know nothing but the few names these files hold."""

import collections
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from golden_weights import to_params

from nanochat_jax.config import GPTConfig
from nanochat_jax.tokenizer import Tokenizer


class Trained(NamedTuple):
    config: GPTConfig
    params: Any
    tokenizer: Tokenizer
    directory: Path


class _Encoding:
    def __setstate__(self, state: dict) -> None:
        self.ranks = state["mergeable_ranks"]


class _VocabularyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return {("tiktoken.core", "Encoding"): _Encoding}[module, name]


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        known = {"_rebuild_tensor_v2": self.rebuild, "OrderedDict": collections.OrderedDict, "FloatStorage": np.float32}
        return known[name]

    def persistent_load(self, reference: tuple) -> np.ndarray:
        _, dtype, key, *_ = reference
        return np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), dtype)

    @staticmethod
    def rebuild(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, [4 * step for step in stride])


def load_tokenizer(directory: Path) -> Tokenizer:
    with (directory / "tokenizer" / "tokenizer.pkl").open("rb") as file:
        return Tokenizer(_VocabularyUnpickler(file).load().ranks)


def load_trained(test_data: Path, era: str) -> Trained:
    directory = test_data / "golden" / f"trained-{era}"
    shape = json.loads(next(directory.glob("meta_*.json")).read_text())["model_config"]
    make = {"classic": GPTConfig.classic, "modern": GPTConfig.modern}[era]
    config = make(shape["n_layer"], **shape, **({"rotary_dtype": "bfloat16"} if era == "classic" else {}))
    with zipfile.ZipFile(next(directory.glob("model_*.pt"))) as archive:
        tensors = _TensorUnpickler(archive, archive.namelist()[0].split("/")[0]).load()
    return Trained(config, jax.tree.map(jnp.asarray, to_params(tensors, config)), load_tokenizer(directory), directory)
