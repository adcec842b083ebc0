"""One command per stage of a run: `python -m scripts.base_train --help`."""

import sys

from nanochat_jax.cli import catch_errors

if sys.argv[0] == "-m":  # a script is starting, and its imports take seconds
    catch_errors()
