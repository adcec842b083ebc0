"""The models of a miniseries, its table, its optimum and its charts."""

import math

import pytest
from small_line import MODEL, make_base

from nanochat_jax.cli import parse
from nanochat_jax.errors import UsageError
from nanochat_jax.metrics import read_metrics
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.size import flops_per_token, num_params
from nanochat_jax.paths import Paths
from nanochat_jax.report.sections import Section, read_sections
from nanochat_jax.report.series import draw_series, optimum, parabola, read_series, write_series
from nanochat_jax.speedrun import miniseries
from nanochat_jax.speedrun.miniseries import MiniseriesConfig, plan_series, train_series
from nanochat_jax.train.pretrain import BaseTrainConfig, pretrain

SHAPE = " ".join(MODEL[2:])  # without the depth
FLAGS = f"{SHAPE} --total-batch-size 512 --device-batch-size 8 --eval-every -1 --eval-tokens 512"


def rows(budget, ratios, bpb):
    return [
        {"budget": budget, "tokens_per_parameter": ratio, "val_bpb": bpb(ratio)} for ratio in ratios
    ]


def test_the_optimum_is_the_lowest_point_of_the_parabola():
    lowest = lambda ratio: 0.8 + 0.3 * (math.log10(ratio) - math.log10(12)) ** 2  # noqa: E731
    assert optimum(rows(1e15, (3, 10, 40, 100), lowest)) == pytest.approx(12)
    # outside of the series, falling without a minimum, and too few models
    assert optimum(rows(1e15, (20, 40, 100), lowest)) is None
    assert optimum(rows(1e15, (3, 10, 40), lambda ratio: -lowest(ratio))) is None
    assert parabola([(3.0, 1.0), (10.0, 0.9)]) is None


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--depths", "4,4"], "different"),
        (["--depths", "4.5"], "depths from 1 to 1000"),
        (["--depths", "x"], "depths"),
        (["--flops", "0"], "positive"),
        (["--flops", "1e15,inf"], "positive"),
    ],
)
def test_mistakes_are_refused(flags, named):
    with pytest.raises(UsageError, match=named):
        parse(MiniseriesConfig, flags, prog="miniseries", description="")


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--depth 7", "`depth`"),
        ("--model-tag mine", "`model_tag`"),
        ("--fresh", "`fresh`"),
        ("--num-iterations 3", "`num_iterations`"),
        ("--lr-scale many", "--lr-scale"),
    ],
)
def test_what_the_series_decides_cannot_be_a_flag(tmp_path, flags, named):
    config = MiniseriesConfig(depths="1,2", flops="1e12", flags=flags)
    with pytest.raises(UsageError, match=named):
        plan_series(config, Paths(tmp_path))


@pytest.mark.slow
def test_a_series_continues_and_is_in_the_report(tmp_path, monkeypatch, capsys):
    paths = make_base(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    trained = []

    def call(command, environment):
        """`base_train` in this process; the second start is killed before it does anything."""
        trained.append(command[command.index("--model-tag") + 1])
        if len(trained) == 2:
            return 75
        with monkeypatch.context() as patch:
            patch.setenv("NANOCHAT_BASE_DIR", environment["NANOCHAT_BASE_DIR"])
            pretrain(parse(BaseTrainConfig, command[3:], prog="base_train", description=""))
        return 0

    monkeypatch.setattr(miniseries, "call", call)
    config = MiniseriesConfig(depths="2,3", flops="2e9", flags=FLAGS)
    assert (
        train_series(config) == 75 and "d3_2e09 ended with exit code 75" in capsys.readouterr().err
    )
    assert train_series(config) == 0 and trained == ["d2_2e09", "d3_2e09", "d3_2e09"]

    table = read_series(tmp_path / "miniseries/series/series.csv")
    assert [row["depth"] for row in table] == [2, 3]
    for row in table:
        model = GPTConfig.modern(
            int(row["depth"]), aspect_ratio=16, head_dim=4, sequence_len=64, vocab_size=300
        )
        assert sum(row[group] for group in miniseries.GROUPS) == num_params(model)
        assert row["flops"] == flops_per_token(model) * row["tokens"] == pytest.approx(2e9, rel=0.1)
        ratio = row["tokens"] / row["scaling_parameters"]
        assert row["tokens_per_parameter"] == pytest.approx(ratio)
        log = (
            tmp_path / f"miniseries/series/base_checkpoints/d{row['depth']:.0f}_2e09/metrics.jsonl"
        )
        last = read_metrics(log)[-1]
        assert (last["kind"], last["val_bpb"]) == ("eval", pytest.approx(row["val_bpb"]))
        assert last["total_training_flops"] == row["flops"]
        assert last["total_training_time"] == pytest.approx(row["seconds"]) and row["seconds"] > 0
    assert not (tmp_path / "base_checkpoints").exists()

    (section,) = read_sections(paths.report)
    assert "| d3 |" in section.items[1]
    charts = draw_series([section])
    assert charts.count("<figure>") == 3 and "log10 of tokens per parameter" in charts
    (tmp_path / "miniseries/series/series.csv").unlink()
    assert "is missing" in draw_series([section])

    with pytest.raises(UsageError, match="another `name`"):
        train_series(MiniseriesConfig(depths="2", flags=f"{FLAGS} --lr-scale 2"))


def test_without_budgets_the_series_is_one_line(tmp_path):
    table = [
        {
            **dict(depth=depth, budget=math.nan, flops=10.0**depth, val_bpb=1 / depth, core=0.1),
            **dict(tokens_per_parameter=8.0, matrices=depth * 100),
        }
        for depth in (4, 6)
    ]
    write_series(tmp_path / "series.csv", table)
    section = Section(
        slug="m",
        section="Miniseries",
        stage="miniseries",
        timestamp="",
        curves=tmp_path / "series.csv",
    )
    charts = draw_series([section])
    assert charts.count("<figure>") == 2 and "the series, log10 of FLOPs 6: 0.1667" in charts
    for damaged in ("", "depth,budget\n4,5\n", "depth\nfour\n"):
        (tmp_path / "series.csv").write_text(damaged)
        assert "is damaged" in draw_series([section])
