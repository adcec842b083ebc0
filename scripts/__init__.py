"""The stages of a run, one command each: `python -m scripts.base_train --help`."""

import sys

from nanochat_jax.cli import catch_errors

if sys.argv[0] == "-m":  # a script starts, whose own imports take seconds
    catch_errors()
