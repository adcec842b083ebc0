"""Inference: one engine of slots for evaluation, rollouts, the command line and the server.

request.py      what is asked, what comes back, and the host's side of one generation (tool
calls, stop strings) sampling.py     logits to token ids on the device, each row with its own
settings and random stream
device.py       the jitted functions: prefill, moving sequences into and between slots,
decoding several steps engine.py       slots, buckets and continuous batching scheduler.py    a
thread that owns an engine loop and serves many callers streaming.py    tokens to text, whole
characters only calculator.py   the tool
"""
