"""Inference: one engine of slots for evaluation, rollouts, the command line and the server."""
