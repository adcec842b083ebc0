"""How much text a run needs, how much a corpus has, and which runs that is enough for."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.data.convert import describe
from nanochat_jax.data.shards import list_shards, open_shard, read_manifest, text_size
from nanochat_jax.metrics import format_count
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import Recipe, derive_recipe

CHARS_PER_SHARD = 250_000_000  # FineWeb-Edu and ClimbMix as shuffled by upstream
CHARS_PER_TOKEN = 4.8  # English web text, vocabulary of 32,768 to 65,536
CROPPED_SHARE = 1.35  # tokens read per token trained on: best-fit packing crops documents
TOKENIZER_CHARS = 2_000_000_000
TOKENIZER_SHARDS = 10  # enough for TOKENIZER_CHARS with documents cut to 10,000 characters
FEW_TIMES = 10  # maximum useful passes over a corpus
DIAL = range(4, 33, 2)  # depths to report


def chars_needed(recipe: Recipe) -> float:
    """Characters that pretraining reads without repeating a document."""
    return recipe.total_tokens * CROPPED_SHARE * CHARS_PER_TOKEN


def shards_needed(recipe: Recipe) -> int:
    """Training shards of 250M characters that the tokenizer and pretraining need."""
    return max(TOKENIZER_SHARDS, int(chars_needed(recipe) / CHARS_PER_SHARD) + 1)


def explain_shards(recipe: Recipe, count: int) -> str:
    return (
        f"{count} training shards of 250M characters: {recipe.total_tokens / 1e9:.2f}B tokens of "
        f"{CHARS_PER_TOKEN} characters, and a third more because rows crop documents; the "
        "tokenizer needs 2B characters"
    )


class Size(NamedTuple):
    documents: int
    text_bytes: int


def measure(paths: Sequence[Path]) -> Size:
    """Documents and approximate UTF-8 bytes of shards, from their footers."""
    documents = text_bytes = 0
    for path in paths:
        with open_shard(path) as file:
            documents += file.metadata.num_rows
            text_bytes += text_size(file)
    return Size(documents, text_bytes)


def summary(name: str, directory: Path) -> str:
    """A few lines: what a corpus holds, and which stages it is enough for."""
    shards = list_shards(directory)
    lines = [f"{name}, in {directory}"]
    lines += [
        f"  from {describe(entry['source'])}: {entry['documents']:,} documents, "
        f"{entry['skipped']:,} rows skipped"
        for entry in read_manifest(directory).get("sources", ())
    ]
    train, val = measure(shards[:-1]), measure(shards[-1:])
    lines += [
        f"  {split:5} {count:6,} shards {size.documents:14,} documents "
        f"{size.text_bytes / 1e6:12,.1f} MB "
        f"{format_count(size.text_bytes / CHARS_PER_TOKEN):>10} tokens, about"
        for split, count, size in (("train", len(shards) - 1, train), ("val", 1, val))
    ]
    return "\n".join([*lines, *(f"  {line}" for line in enough_for(name, train))])


def enough_for(name: str, train: Size) -> list[str]:
    if not train.documents:
        return [
            "not enough to train: the only shard is the validation shard; at least two are needed"
        ]
    if name == "embedded":
        return ["enough for all stages of the preset for a CPU"]
    share = train.text_bytes / TOKENIZER_CHARS
    percent = "all" if share >= 1 else f"{share:.1%}" if share >= 0.001 else "less than 0.1%"
    lines = [f"tok_train: {percent} of the 2 billion characters that it reads"]
    reference = GPTConfig.modern(12)
    needs = {
        depth: chars_needed(derive_recipe(GPTConfig.modern(depth), reference=reference))
        for depth in DIAL
    }
    fitting = [depth for depth, chars in needs.items() if chars <= train.text_bytes]
    following = next((depth for depth, chars in needs.items() if chars > train.text_bytes), None)
    text = (
        f"up to d{fitting[-1]} without repeating a document"
        if fitting
        else "any depth, with repetitions"
    )
    if following is not None:
        times = needs[following] / train.text_bytes
        text += f"; d{following} reads it {times:.1f} times" if times < FEW_TIMES else ""
        if not fitting and times >= FEW_TIMES:
            text = f"too small a corpus; d{following} needs {needs[following] / 1e9:.1f} GB of text"
    return [*lines, f"base_train: {text}", "base_loss, base_eval: the validation shard exists"]
