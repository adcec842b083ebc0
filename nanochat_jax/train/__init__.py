"""Training: the loop, its step, the optimizer, and the stages."""
