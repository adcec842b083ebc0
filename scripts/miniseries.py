"""Train a series of base models of several depths, for scaling laws.

    python -m scripts.miniseries --depths 12,14,16,18,20
    python -m scripts.miniseries --depths 1,2,3,4 --flops 1e12,3e12

Writes miniseries/NAME/series.csv under the base directory, and a section with charts of the report.
A second run continues where the first one stopped.
"""

from nanochat_jax import cli
from nanochat_jax.speedrun.miniseries import MiniseriesConfig, train_series

if __name__ == "__main__":
    cli.run(train_series, MiniseriesConfig, prog="scripts.miniseries", description=__doc__)
