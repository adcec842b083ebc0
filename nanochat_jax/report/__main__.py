"""`python -m nanochat_jax.report generate`, or `reset`."""

from nanochat_jax.report.sections import main

main()
