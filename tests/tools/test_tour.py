"""The tour: what its picture shows is what the model computes."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra `docs` is not installed")

from small_line import MODEL, make_base, run  # noqa: E402

import nanochat_jax  # noqa: E402
from nanochat_jax.checkpoint import load_model  # noqa: E402
from nanochat_jax.data.loader import pretraining_loader  # noqa: E402
from nanochat_jax.errors import UsageError  # noqa: E402
from nanochat_jax.model.attention import causal_attention  # noqa: E402
from nanochat_jax.model.compute import Compute  # noqa: E402
from nanochat_jax.model.gpt import forward  # noqa: E402
from nanochat_jax.model.sharding import make_mesh  # noqa: E402
from nanochat_jax.train.optim import OptimizerConfig, Schedules, constant, make_optimizer  # noqa: E402

pytestmark = pytest.mark.slow
SPEC = importlib.util.spec_from_file_location("tour", Path(__file__).parents[2] / "docs/tour.py")
tour = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tour)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A base directory with a model of a few steps."""
    paths = make_base(tmp_path_factory.mktemp("tour"))
    run(
        "base_train",
        *MODEL,
        "--num-iterations",
        "6",
        "--total-batch-size",
        "512",
        "--device-batch-size",
        "8",
        "--eval-tokens",
        "512",
        "--warmup-steps",
        "0",
        "--sample-every",
        "-1",
        base=paths.base,
    )
    return paths


@pytest.fixture
def model(paths, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(paths.base))
    return nanochat_jax.load("base")


def test_the_weights_shown_are_those_that_give_the_attention_its_output(model):
    ids, kept = model.tokenizer.encode("apple banana river window summer"), []

    def keep(q, k, v, *, window):
        kept.append((v, causal_attention(q, k, v, window=window)))
        return kept[-1][1]

    forward(model.params, jnp.asarray([ids]), model.config, Compute(attention=keep))
    for weights, (v, out) in zip(tour.attention_weights(model, ids), kept, strict=True):
        values = jnp.repeat(v[0], weights.shape[0] // v.shape[2], axis=1)
        np.testing.assert_allclose(jnp.einsum("hts,shd->thd", weights, values), out[0], atol=1e-5)


def test_a_point_of_the_landscape_is_the_loss_after_a_step_of_an_optimizer_with_these_rates(paths):
    losses, before = tour.landscape(paths, None, np.array([0.0, 2.0]))
    assert losses[0, 0] == pytest.approx(before)

    base = load_model(paths, "base", mesh=make_mesh("1x1"))
    batches = {}
    for split in ("train", "val"):
        rows = pretraining_loader(
            paths.data("embedded"),
            base.tokenizer,
            split=split,
            batch_size=8,
            sequence_len=base.config.sequence_len,
            packing=base.meta["packing"],
            num_shards=1,
        )
        found = next(rows)
        batches[split] = jnp.asarray(found["inputs"]), jnp.asarray(found["targets"])
        rows.close()
    doubled = make_optimizer(
        base.config,
        OptimizerConfig(**base.meta["rates"]),
        Schedules(
            lr_multiplier=constant(2.0),
            momentum=constant(0.95),
            weight_decay=constant(0.0),
            lr_scale=base.meta["lr_scale"],
        ),
    )
    gradient = jax.jit(jax.grad(tour.mean_loss), static_argnames="config")(
        base.params, *batches["train"], config=base.config
    )
    update, _ = jax.jit(doubled.update)(gradient, doubled.init(base.params), base.params)
    after = tour.mean_loss(
        jax.tree.map(jnp.add, base.params, update), *batches["val"], config=base.config
    )
    assert losses[1, 1] == pytest.approx(float(after), rel=1e-4)
    assert losses[0, 1] != pytest.approx(losses[1, 0]), "both axes move the same parameters"


def test_a_picture_is_made_and_a_head_that_is_not_there_is_named(
    paths, model, tmp_path, capsys, monkeypatch
):
    config = dict(source="base", prompt="apple banana", grid=3, out=str(tmp_path / "tour.png"))
    (tmp_path / "tour.png").write_text("a picture of the user's")
    tour.main(tour.TourConfig(layer=1, head=7, **config))
    assert (tmp_path / "tour.png").read_bytes().startswith(b"\x89PNG")
    assert [path.read_text() for path in tmp_path.glob("tour.old-*")] == ["a picture of the user's"]
    out, progress = capsys.readouterr()
    # colours are for a terminal
    assert out.startswith("<|bos|>|<|user_start|>|") and "\x1b" not in out
    assert [line[:3] for line in progress.splitlines() if line[1:3] == "/4"] == [
        "1/4",
        "2/4",
        "3/4",
        "4/4",
    ]
    with pytest.raises(UsageError, match="2 layers of 8 heads"):
        tour.main(tour.TourConfig(layer=2, head=0, **config))
    monkeypatch.setattr(tour, "matplotlib", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        tour.main(tour.TourConfig(**config))
