"""Tools for TPU slices. The planner (`python -m tpu.plan`) also covers GPUs."""
