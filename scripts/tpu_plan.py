"""Plan a training run on TPUs or GPUs: the same command as `python -m tpu.plan`."""

from nanochat_jax import cli
from tpu import plan
from tpu.plan import PlanConfig

if __name__ == "__main__":
    cli.run(plan.main, PlanConfig, prog="scripts.tpu_plan", description=plan.__doc__)
