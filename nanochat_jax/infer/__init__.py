"""Inference: one engine of slots for evaluation, rollouts, the command line and the server.

request.py     sampling, requests, results, and the state of one generation
sampling.py    logits to token ids on the device
decode.py      jitted functions: prefill, copy, resize, decode
slots.py       the slots of the cache, and the prefix that a prompt reuses
engine.py      continuous batching over the slots
scheduler.py   a thread that runs one engine loop for many callers
streaming.py   token bytes to text, complete characters only
padding.py     padded sizes and batches
bench.py       measuring the speed of prefill and decoding
calculator.py  the calculator tool
"""
