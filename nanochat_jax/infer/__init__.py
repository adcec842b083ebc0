"""Inference: one engine of slots for evaluation, rollouts, the command line and the server.

request.py     requests, results and the state of one generation (tool calls, stop strings)
sampling.py    logits to token ids on the device
decode.py      jitted functions: prefill, insert, copy, resize, decode
engine.py      slots, padded lengths and continuous batching
scheduler.py   a thread that owns an engine loop and serves many callers
streaming.py   token bytes to text, complete characters only
padding.py     padded batches
calculator.py  the calculator tool
"""
