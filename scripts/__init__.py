"""The stages of a run, one command each: `python -m scripts.base_train --help`."""
