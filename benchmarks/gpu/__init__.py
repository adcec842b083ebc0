"""The GPU benchmark: checks, training, decoding and float8 on one device in nine minutes.

__main__.py    starts each run as a child process with a time limit
plan.py        phases, limits and sizes
record.py      the result file
summary.py     the table for people
child.py       one run
program.py     the train step and the decode program of nanochat_jax
timing.py      seconds per call; traces reduced to their longest kernels
checks.py, training.py, decoding.py, float8.py, reference.py    what the runs measure
"""
