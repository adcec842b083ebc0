"""PyTorch's `.pt` files and nanochat's `tokenizer.pkl`, read and written without torch.

A `.pt` file is a zip archive: `data.pkl` is a pickle of the tensors' names, shapes and strides,
`data/<key>` are their bytes. Unpickling can run code, so our unpicklers accept the few classes that
such files need and refuse all others: nothing from a file is executed.
"""

import collections
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from nanochat_jax.errors import NotFound, UsageError, one_line

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
ALIGNMENT = 64  # of each tensor in the file, as torch aligns them


def read_pt(path: Path) -> Any:
    """What `torch.save` wrote: a tensor as an array, a state dict as a dict of arrays.

    Raises `NotFound` if the file is missing, and `UsageError` if it is damaged or holds anything
    but plain containers of tensors.
    """
    with _refusing(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(
                    f"{info.filename} is compressed, which torch never does: it could unpack to "
                    "any size"
                )
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if not roots:
            raise ValueError("it has no data.pkl")
        root = roots[0]
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        with archive.open(f"{root}data.pkl") as file:
            return _TensorUnpickler(file, lambda key: archive.read(f"{root}data/{key}")).load()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turns any error in this block into a `UsageError` with the file's name."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist") from error
    except UsageError:
        raise
    except Exception as error:  # damaged pickles raise nearly any exception
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {one_line(error)}): it is damaged or "
            "another kind of file"
        ) from error


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read = read

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: only tensors belong in this file"
            )
        return known[module, name]

    def persistent_load(self, reference: tuple) -> np.ndarray:
        kind, storage, key, _, count = reference
        if kind != "storage" or storage not in STORAGES:
            raise pickle.UnpicklingError(f"refused a reference to {kind!r} {storage!r}")
        dtype, content = STORAGES[storage], self._read(key)
        if len(content) != count * dtype.itemsize:
            raise ValueError(f"data/{key} has {len(content)} bytes, not {count} x {dtype.itemsize}")
        return np.frombuffer(content, dtype)


class _RebuildTensor:
    """Called by the pickle. It has no attributes that a pickle could set, unlike a function."""

    __slots__ = ()

    def __call__(
        self,
        storage: np.ndarray,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *_: Any,
    ) -> np.ndarray:
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
            raise ValueError(f"a tensor has shape {shape}, strides {stride}, offset {offset}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
        if math.prod(shape) and last >= storage.size:
            raise ValueError(
                f"a tensor of shape {shape} reaches past the {storage.size} elements of its storage"
            )
        byte_strides = [step * storage.dtype.itemsize for step in stride]
        view = np.lib.stride_tricks.as_strided
        return view(storage[offset:], shape, byte_strides, writeable=False)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        return tensor


def write_pt(path: Path, content: np.ndarray | Mapping[str, np.ndarray]) -> None:
    """Write an array or a state dict for `torch.load(path, weights_only=True)`.

    Not atomic: callers write to a temporary directory and rename it.
    """
    root = path.stem
    if isinstance(content, np.ndarray):
        names, arrays = None, [content]
    else:
        names, arrays = list(content), list(content.values())
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", _pickle(names, arrays))
        archive.writestr(f"{root}/byteorder", "little")
        for key, array in enumerate(arrays):
            info = zipfile.ZipInfo(f"{root}/data/{key}")
            # after the local header, the name and the head of the padding
            start = file.tell() + 30 + len(info.filename) + 4
            padding = -start % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        archive.writestr(f"{root}/version", "3\n")


def _pickle(names: list[str] | None, arrays: list[np.ndarray]) -> bytes:
    """The protocol-2 pickle of a state dict, or of one tensor if `names` is None.

    Written opcode by opcode, because a pickler would import torch to check the names it writes.
    """
    storage_names = {dtype: name for name, dtype in STORAGES.items()}

    def number(value: int) -> bytes:
        if value < 2**31:
            return b"J" + struct.pack("<i", value)
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(digits)]) + digits

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def tuple_of(*items: bytes) -> bytes:
        return b"(" + b"".join(items) + b"t"

    def tensor(key: int, array: np.ndarray) -> bytes:
        storage = b"ctorch\n%s\n" % storage_names[array.dtype].encode()
        size = number(array.size)
        reference = tuple_of(text("storage"), storage, text(str(key)), text("cpu"), size) + b"Q"
        strides = np.cumprod((1, *array.shape[:0:-1]))[::-1].tolist() if array.ndim else []
        shape, steps = (tuple_of(*map(number, numbers)) for numbers in (array.shape, strides))
        hooks = b"ccollections\nOrderedDict\n)R"
        arguments = tuple_of(reference, number(0), shape, steps, b"\x89", hooks)
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"

    tensors = [tensor(key, array) for key, array in enumerate(arrays)]
    if names is None:
        return b"\x80\x02" + tensors[0] + b"."
    items = b"".join(text(name) + value for name, value in zip(names, tensors))
    return b"\x80\x02}(" + items + b"u."


@dataclass
class PickledEncoding:
    """What a pickled `tiktoken.Encoding` holds."""

    pattern: str = ""
    mergeable_ranks: Any = None
    special_tokens: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pattern, self.mergeable_ranks = state["pat_str"], state["mergeable_ranks"]
        self.special_tokens = state["special_tokens"]


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: only a tiktoken Encoding belongs in this file"
            )
        return PickledEncoding


def read_encoding(path: Path) -> PickledEncoding:
    """The vocabulary in nanochat's `tokenizer.pkl`. Raises as `read_pt` does."""
    with _refusing(path), path.open("rb") as file:
        encoding = _EncodingUnpickler(file).load()
        if not isinstance(encoding, PickledEncoding) or not isinstance(encoding.pattern, str):
            raise ValueError("it holds no vocabulary")
        for table, kind in ((encoding.mergeable_ranks, bytes), (encoding.special_tokens, str)):
            if not isinstance(table, dict) or not all(
                type(k) is kind and type(v) is int for k, v in table.items()
            ):
                raise ValueError("its vocabulary is not a table of tokens and ids")
        return encoding
