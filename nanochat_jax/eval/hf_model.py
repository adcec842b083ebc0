"""Evaluation of causal language models of transformers. Needs the extra `torch`."""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.loader import pretraining_loader
from nanochat_jax.errors import NotFound, UsageError, one_line
from nanochat_jax.eval.scoring import WINDOW, Key, Row, RowScore

try:
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as error:
    raise NotFound(
        f"`hf_path` needs PyTorch and transformers ({error}): pip install 'nanochat_jax[torch]'"
    ) from error

log = logging.getLogger(__name__)

# what transformers raises for a damaged directory
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class HFTokenizer:
    """The part of `Tokenizer` that evaluation needs, for a tokenizer of transformers."""

    def __init__(self, directory: Path, *, trust_remote_code: bool) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        # GPT-2 starts texts with its end-of-text token
        first = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        if first == (None, None):
            raise UsageError(
                f"the tokenizer in {directory} has no token that begins a text: set its bos_token"
            )
        self.bos_id: int = next(token for token in first if token is not None)

    def encode(self, text: str | Sequence[str], prepend: int | None = None) -> Any:
        ids = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        before = [] if prepend is None else [prepend]
        return before + ids if isinstance(text, str) else [before + row for row in ids]

    def encode_batch(
        self, texts: Any, prepend: int, num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and offsets of an Arrow array of texts, as `Tokenizer.encode_batch`."""
        rows = self.encode(texts.to_pylist(), prepend)
        ids = np.concatenate([np.array(row, np.int32) for row in rows])
        return ids, np.cumsum([0, *map(len, rows)])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))

    def token_bytes(self, size: int) -> np.ndarray:
        """UTF-8 bytes of each id decoded separately, 0 for special ones: [size] int32."""
        special = set(self._tokenizer.all_special_ids)
        texts = self._tokenizer.batch_decode([[i] for i in range(min(size, len(self._tokenizer)))])
        num_bytes = np.zeros(size, np.int32)
        for i, text in enumerate(texts):
            num_bytes[i] = 0 if i in special else len(text.encode())
        return num_bytes


class HFModel:
    """A model directory of transformers, on a GPU if torch has one. Called like `scoring.Scorer`.

    Args:
      tokens: tokens per batch, including padding.
    """

    def __init__(self, directory: Path, *, tokens: int, trust_remote_code: bool = False) -> None:
        if not (directory / "config.json").is_file():
            raise NotFound(
                f"`hf_path={directory}`: no config.json there, so it is not a transformers model"
            )
        try:
            self.tokenizer = HFTokenizer(directory, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                directory, trust_remote_code=trust_remote_code, dtype="auto"
            )
        except DAMAGED as error:
            raise UsageError(
                f"`hf_path={directory}`: transformers cannot load it: {one_line(error)}"
            ) from error
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokens = model.eval().to(self.device), tokens
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.sequence_len = getattr(model.config, "max_position_embeddings", None) or 1024
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        # Learned positions limit the length (OPT's table has two more rows); rotary ones do not.
        tables = (
            module.num_embeddings
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
        )
        self._longest = (
            self.sequence_len if any(n - self.sequence_len in (0, 2) for n in tables) else None
        )

    def _logits(self, inputs: np.ndarray, keep: slice) -> torch.Tensor:
        """Logits [B, n, V] of the positions `keep` of inputs [B, T]."""
        ids = torch.as_tensor(inputs, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            if self._keeps:
                at = torch.arange(inputs.shape[1], device=self.device)[keep]
                return self.model(ids, use_cache=False, logits_to_keep=at).logits.float()
            return self.model(ids, use_cache=False).logits[:, keep].float()

    def __call__(
        self, examples: Iterable[tuple[Key, Sequence[Row]]]
    ) -> Iterator[tuple[Key, list[RowScore]]]:
        """(key, rows) to (key, score of each row), in the same order."""
        source = iter(examples)
        while window := list(islice(source, WINDOW)):
            rows = [
                (e, r, self._crop(row))
                for e, (_, group) in enumerate(window)
                for r, row in enumerate(group)
            ]
            rows.sort(key=lambda entry: entry[2].end)
            scores: list[dict[int, RowScore]] = [{} for _ in window]
            start = 0
            while start < len(rows):
                stop = start + 1
                while stop < len(rows) and (stop + 1 - start) * rows[stop][2].end <= self.tokens:
                    stop += 1
                for (e, r, _), score in zip(
                    rows[start:stop], self.score([row for *_, row in rows[start:stop]]), strict=True
                ):
                    scores[e][r] = score
                start = stop
            for (key, group), by_row in zip(window, scores, strict=True):
                yield key, [by_row[r] for r in range(len(group))]

    def _crop(self, row: Row) -> Row:
        cut = max(0, row.end - self._longest) if self._longest else 0
        return Row(row.tokens[cut : row.end], max(1, row.start - cut), row.end - cut)

    def score(self, rows: Sequence[Row]) -> list[RowScore]:
        """The scores of the rows of one batch."""
        tokens = np.zeros((len(rows), max(row.end for row in rows)), np.int64)
        for i, row in enumerate(rows):
            tokens[i, : row.end] = row.tokens[: row.end]
        first = min(row.start for row in rows) - 1
        logits, scores = self._logits(tokens, slice(first, tokens.shape[1] - 1)), []
        for i, row in enumerate(rows):
            inside = logits[i, row.start - 1 - first : row.end - 1 - first]
            target = torch.as_tensor(tokens[i, row.start : row.end], device=self.device)
            length = row.end - row.start
            nll = float(F.cross_entropy(inside, target)) if length else math.nan
            scores.append(RowScore(nll, bool((inside.argmax(-1) == target).all())))
        return scores

    def bits_per_byte(self, corpus: Path, rows: int, split_tokens: int) -> dict[str, float]:
        """`train_bpb` and `val_bpb` over `split_tokens` tokens per split, in batches of `rows`."""
        length, results = min(self.sequence_len, 2048), {}
        token_bytes = torch.as_tensor(
            self.tokenizer.token_bytes(self.vocab_size), device=self.device
        )
        for split in ("train", "val"):
            batches = pretraining_loader(
                corpus,
                self.tokenizer,
                split=split,
                batch_size=rows,
                sequence_len=length,
                num_shards=1,
            )
            nats = count = 0.0
            for _ in range(max(1, split_tokens // (rows * length))):
                batch = next(batches)
                targets = torch.as_tensor(batch["targets"], dtype=torch.long, device=self.device)
                logits = self._logits(batch["inputs"], slice(None)).transpose(1, 2)
                losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-1)
                num_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
                nats += float(losses[num_bytes > 0].sum(dtype=torch.float64))
                count += float(num_bytes.sum())
            batches.close()
            results[f"{split}_bpb"] = nats / (math.log(2) * count) if count else math.inf
            log.info("%s: %.4f bits per byte", split, results[f"{split}_bpb"])
        return results

    def continuation(self, prompt: str, max_tokens: int, seed: int | None = None) -> str:
        """Greedy continuation, or sampled at temperature 1 if `seed` is given."""
        ids = torch.tensor(
            [self.tokenizer.encode(prompt, prepend=self.tokenizer.bos_id)], device=self.device
        )
        if seed is not None:
            torch.manual_seed(seed)
        options = (
            {"do_sample": False}
            if seed is None
            else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        )
        out = self.model.generate(
            ids,
            max_new_tokens=max_tokens,
            **options,
            attention_mask=torch.ones_like(ids),
            pad_token_id=self.tokenizer.bos_id,
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :].tolist())
