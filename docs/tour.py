"""Pictures of a trained model: chat masks, attention, next tokens, and its loss landscape.

pip install matplotlib                           # or the package with its extra `docs`
python docs/tour.py                              the newest finetuned model; writes tour.png
python docs/tour.py --prompt "Who are you?" --layer 2 --head 1
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nanochat_jax import cli, load
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import directory_name, flag
from nanochat_jax.conversation import (
    render_conversation,
    render_for_completion,
    visualize_tokenization,
)
from nanochat_jax.data.loader import pretraining_loader
from nanochat_jax.devices import DeviceFlags, start
from nanochat_jax.errors import UsageError
from nanochat_jax.files import keep_old, make_directory
from nanochat_jax.model.attention import causal_attention
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward
from nanochat_jax.model.loss import Batch, token_nll
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.model.size import num_params
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths
from nanochat_jax.pretrained import Model
from nanochat_jax.train.optim import OptimizerConfig, Schedules, constant, make_optimizer

try:
    import matplotlib
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm

    matplotlib.use("Agg")
except ModuleNotFoundError:  # `main` reports it; the flags must work without it
    matplotlib = Axes = None

SIGNATURE = "nanochat_jax docs/tour.py"  # metadata that marks the picture as this program's
INK, PALE, GREEN, RED = "#1f2937", "#e5e7eb", "#a7e3c5", "#e4572e"
STYLE: dict[str, Any] = {
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
EXAMPLE = {
    "messages": [
        {"role": "user", "content": "What is 345 + 678?"},
        {
            "role": "assistant",
            "content": [
                {"type": "python", "text": "345 + 678"},
                {"type": "python_output", "text": "1023"},
                {"type": "text", "text": "345 + 678 is 1023."},
            ],
        },
    ]
}


@dataclass(frozen=True, kw_only=True)
class TourConfig(DeviceFlags):
    source: str = flag("sft", "stage whose model to show", short="-i", choices=[*CHECKPOINT_DIRS])
    model_tag: str | None = flag(
        None, "model tag; the largest d<depth> if not given", short="-g", check=directory_name
    )
    prompt: str = flag("How are you today?", "question to answer", short="-p")
    layer: int | None = flag(
        None,
        "layer of the attention head, from 0; default the head with the sharpest look back",
        at_least=0,
        at_most=1000,
    )
    head: int | None = flag(None, "the head, from 0 (with --layer)", at_least=0, at_most=10**6)
    grid: int = flag(13, "points per axis of the landscape, odd", at_least=3, at_most=999)
    out: str = flag("tour.png", "file of the picture")

    def __post_init__(self) -> None:
        if (self.layer is None) != (self.head is None):
            raise ValueError("--layer and --head select a head: give both or neither")
        if self.grid % 2 == 0:
            raise ValueError(
                f"--grid must be odd, so that the schedule's rates are a point; got {self.grid}"
            )


def pieces(model: Model, ids: list[int]) -> list[str]:
    """Each token as readable text: spaces as dots, special tokens without their bars."""
    texts = [model.tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎") for token in ids]
    return [
        f"‹{text[2:-2]}›" if text.startswith("<|") and text.endswith("|>") else text
        for text in texts
    ]


def attention_weights(model: Model, ids: list[int]) -> list[Array]:
    """Per layer the attention [H, T, T] of each head over the tokens `ids`."""
    weights = []

    def record(q: Array, k: Array, v: Array, *, window: int | None) -> Array:
        keys = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", q, keys).astype(jnp.float32) / q.shape[-1] ** 0.5
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
        seen = (distance >= 0) & (distance <= (q.shape[1] if window is None else window))
        weights.append(jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)[0])
        return causal_attention(q, k, v, window=window)

    forward(
        model.params,
        jnp.asarray([ids], jnp.int32),
        model.config,
        model.compute.replace(attention=record),
    )
    return weights


def sharpest_head(weights: list[Array]) -> tuple[int, int]:
    """The (layer, head) with the largest weights on a distant token, averaged over queries.

    The last two tokens, which many heads attend to, and the first, the usual default, do not count.
    """

    def sharpness(head: Array) -> float:
        earlier = jnp.tril(head, k=-2).at[:, 0].set(0.0)
        return float(earlier.max(axis=-1).mean())

    heads = [(layer, head) for layer, w in enumerate(weights) for head in range(w.shape[0])]
    return max(heads, key=lambda at: sharpness(weights[at[0]][at[1]]))


def next_tokens(
    model: Model, prompt: list[int], most: int, top: int
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The greedy answer to a prompt, and the `top` most likely tokens at each position.

    Returns (answer [N], ids [N, top], probabilities [N, top]), N at most `most`.
    """
    answer = model.generate(prompt, max_tokens=most, temperature=0.0)
    if not answer:
        raise UsageError("the model returns an empty reply: ask something else with --prompt")
    logits = model.logits([prompt + answer])[0, len(prompt) - 1 : -1]  # [N, V]
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    ids = np.argsort(-probabilities, axis=-1)[:, :top]
    return answer, ids, np.take_along_axis(probabilities, ids, axis=-1)


def landscape(paths: Paths, tag: str | None, multipliers: np.ndarray) -> tuple[np.ndarray, float]:
    """Held-out loss after one optimizer step from the base model, for a grid of learning rates.

    A step is linear in the learning rates, so one gradient serves the whole grid. One multiplier
    scales the matrices' part of the update (Muon), the other the rest (AdamW: tables and scalars).
    The optimizer state is new.

    Returns (losses [rows: tables, columns: matrices] in nats per token, the loss before the step).
    """
    base = load_model(paths, "base", tag=tag, mesh=make_mesh("1x1"))
    config, corpus = base.config, paths.data(base.meta["data"] or paths.find_data())

    def batch(split: str) -> tuple[Array, Array]:
        rows = pretraining_loader(
            corpus,
            base.tokenizer,
            split=split,
            batch_size=8,
            sequence_len=config.sequence_len,
            packing=base.meta["packing"],
            num_shards=1,
        )
        batch = next(rows)
        rows.close()
        return jnp.asarray(batch["inputs"]), jnp.asarray(batch["targets"])

    rates = OptimizerConfig(**base.meta["rates"]) if "rates" in base.meta else OptimizerConfig()
    schedules = Schedules(
        lr_multiplier=constant(1.0),
        momentum=constant(0.95),
        weight_decay=constant(0.0),
        lr_scale=base.meta.get("lr_scale", 1.0),
    )
    optimizer = make_optimizer(config, rates, schedules)
    gradient = jax.jit(jax.grad(mean_loss), static_argnames="config")(
        base.params, *batch("train"), config=config
    )
    update, _ = jax.jit(optimizer.update)(gradient, optimizer.init(base.params), base.params)
    inputs, targets = batch("val")

    @jax.jit
    def after(matrices: Array, tables: Array) -> Array:
        def moved(path: tuple, param: Array, step: Array) -> Array:
            return param + (matrices if path[0].key in ("blocks", "ve_gate") else tables) * step

        return mean_loss(
            jax.tree.map_with_path(moved, base.params, update), inputs, targets, config=config
        )

    losses = np.zeros((len(multipliers), len(multipliers)))
    for row, tables in enumerate(multipliers):
        losses[row] = [after(matrices, tables) for matrices in multipliers]
        progress(f"    row {row + 1} of {len(multipliers)}")
    return losses, float(after(0.0, 0.0))


def mean_loss(params: Params, inputs: Array, targets: Array, *, config: GPTConfig) -> Array:
    """Nats per token of targets [B, T] after inputs [B, T]; negative targets are ignored."""
    total, _ = token_nll(params, Batch(inputs, targets), config, Compute())
    return total / (targets >= 0).sum()


def draw_masks(axes: Axes, tokens: list[str], mask: list[int], per_line: int = 96) -> None:
    """Tokens in boxes, line by line; trained ones are green."""
    column, line = 0.0, 0
    for text, trained in zip(tokens, mask, strict=True):
        if column + len(text) + 1.2 > per_line:
            column, line = 0.0, line + 1
        box = dict(width=len(text) + 0.7, height=0.72, lw=0, color=GREEN if trained else PALE)
        axes.add_patch(plt.Rectangle((column, -line - 0.36), **box))
        axes.text(column + len(text) / 2 + 0.35, -line - 0.02, text, color=INK, **text_style(9.5))
        column += len(text) + 1.2
    axes.set(
        xlim=(0, per_line),
        ylim=(-line - 0.6, 0.6),
        title="The tokens of a conversation that are trained on: the green ones",
    )
    axes.axis("off")


def text_style(size: float) -> dict[str, Any]:
    return dict(family="monospace", fontsize=size, ha="center", va="center")


def draw_attention(axes: Axes, tokens: list[str], weights: Array, layer: int, head: int) -> None:
    image = axes.imshow(weights, cmap="magma_r", norm=PowerNorm(0.5, 0, 1))
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, family="monospace", fontsize=6)
    axes.set_yticks(range(len(tokens)), tokens, family="monospace", fontsize=6)
    axes.set(title=f"Attention of head {head} in layer {layer}", ylabel="from", xlabel="to")
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label="weight")


def draw_next(
    axes: Axes,
    answer: list[str],
    candidates: list[list[str]],
    probabilities: np.ndarray,
    title: str,
) -> None:
    """A column per token of the answer: its most likely candidates, from the top."""
    axes.imshow(probabilities.T, cmap="GnBu", norm=PowerNorm(0.5, 0, 1), aspect="auto")
    for column, (texts, row) in enumerate(zip(candidates, probabilities, strict=True)):
        for rank, (text, probability) in enumerate(zip(texts, row, strict=True)):
            text = text if len(text) <= 14 else text[:13] + "…"
            color = "white" if probability > 0.45 else INK
            axes.text(column, rank, f"{text}\n{probability:.1%}", color=color, **text_style(8))
    ranks = range(probabilities.shape[1])
    axes.set_xticks(range(len(answer)), answer, family="monospace", fontsize=9)
    axes.set_yticks(ranks, [f"{rank + 1}." for rank in ranks])
    axes.set(title=title, xlabel="the answer, token by token")
    axes.tick_params(length=0)


def draw_landscape(axes: Axes, multipliers: np.ndarray, losses: np.ndarray, before: float) -> None:
    # limit the range: large losses would hide the minimum
    change = np.clip(losses - before, None, 3 * (before - losses.min()) + 1e-9)
    levels = np.linspace(change.min(), change.max(), 25)
    grid = (multipliers, multipliers, change)
    image = axes.contourf(*grid, levels=levels, cmap="viridis")
    axes.contour(*grid, levels=[0.0], colors="white", linewidths=1.2, linestyles="--")
    row, column = np.unravel_index(losses.argmin(), losses.shape)
    peak = dict(color="white", markersize=9, markeredgecolor=INK)
    axes.plot(1, 1, "o", label="the peak learning rates", **peak)
    best = dict(color=RED, markersize=16, markeredgecolor="white")
    label = f"best: {losses.min() - before:+.3f} nats per token"
    axes.plot(multipliers[column], multipliers[row], "*", label=label, **best)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_box_aspect(1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(
            lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"
        )
    axes.set(
        title="Held-out loss after one more step, by learning rate",
        xlabel="matrices (Muon)",
        ylabel="embeddings and scalars (AdamW)",
    )
    axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
    label = "change of the loss; dashed: none"
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label=label, format="%+.3f")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pictures_of_model(config: TourConfig, model: Model) -> list[tuple[Any, Callable]]:
    """Compute what the pictures of masks, attention and next tokens show.

    Returns for each picture its cell in the figure and a function that draws it on axes.
    """
    progress("1/4 which tokens of a chat are trained on")
    ids, mask = render_conversation(model.tokenizer, EXAMPLE)
    shown = visualize_tokenization(model.tokenizer, ids, mask)
    print(shown if sys.stdout.isatty() else re.sub(r"\x1b\[\d+m", "", shown), flush=True)
    tokens = pieces(model, ids)

    progress("2/4 what an attention head looks at")
    weights = attention_weights(model, ids)
    layer, head = sharpest_head(weights) if config.layer is None else (config.layer, config.head)
    if not (0 <= layer < len(weights) and 0 <= head < weights[layer].shape[0]):
        raise UsageError(
            f"--layer {layer} --head {head}: the model has {len(weights)} layers of "
            f"{weights[0].shape[0]} heads"
        )

    progress("3/4 the most likely next tokens")
    conversation = [
        {"role": "user", "content": config.prompt},
        {"role": "assistant", "content": ""},
    ]
    prompt = render_for_completion(model.tokenizer, {"messages": conversation}, sys.maxsize)
    answer, candidates, probabilities = next_tokens(model, prompt, most=10, top=5)
    print(f"{config.prompt} {model.tokenizer.decode(answer)}", flush=True)
    answer_texts = pieces(model, answer)
    candidate_texts = [pieces(model, row) for row in candidates]
    return [
        ((0, slice(None)), lambda axes: draw_masks(axes, tokens, mask)),
        ((1, 0), lambda axes: draw_attention(axes, tokens, weights[layer][head], layer, head)),
        (
            (2, slice(None)),
            lambda axes: draw_next(
                axes,
                answer_texts,
                candidate_texts,
                probabilities,
                f"The most likely next tokens: {config.prompt!r}",
            ),
        ),
    ]


def picture_of_landscape(config: TourConfig, paths: Paths) -> tuple[Any, Callable]:
    progress(
        f"4/4 the loss landscape: held-out loss at {config.grid} x {config.grid} learning rates"
    )
    multipliers = 2.0 ** np.linspace(-5, 5, config.grid)
    losses, before = landscape(paths, config.model_tag, multipliers)
    row, column = np.unravel_index(losses.argmin(), losses.shape)
    at_peak = losses[config.grid // 2, config.grid // 2]
    print(
        f"held-out loss {before:.4f}; after one step with the peak learning rates {at_peak:.4f}, "
        f"at best {losses.min():.4f} (matrices x{multipliers[column]:g}, "
        f"tables x{multipliers[row]:g})"
    )
    return (1, 1), lambda axes: draw_landscape(axes, multipliers, losses, before)


def main(config: TourConfig) -> None:
    if matplotlib is None:
        raise UsageError(
            "the tour draws with matplotlib, which is not installed: `pip install matplotlib`"
        )
    make_directory(Path(config.out).absolute().parent)
    progress("drawing four pictures into one; a d4 takes about a minute on two CPU cores")
    paths = Paths.from_env()
    start(paths, config)
    model = load(config.source, tag=config.model_tag)
    pictures = [*pictures_of_model(config, model), picture_of_landscape(config, paths)]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 11), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=[0.65, 3.3, 1.7])
        figure.suptitle(
            f"{model.source} model, step {model.step}: {model.config.n_layer} layers, "
            f"{num_params(model.config) / 1e6:.1f}M parameters",
            fontsize=14,
            fontweight="bold",
        )
        for cell, draw in pictures:
            draw(figure.add_subplot(grid[cell]))
        out = Path(config.out)
        if out.exists() and SIGNATURE.encode() not in out.read_bytes():  # the user's picture
            print(f"{out} is not a picture of this program: kept as {keep_old(out)}")
        figure.savefig(out, dpi=110, metadata={"Title": SIGNATURE})
        plt.close(figure)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    cli.run(main, TourConfig, prog="docs.tour", description=__doc__)
