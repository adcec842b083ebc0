"""`python -m tpu.plan`: see scripts/tpu_plan.py."""

from scripts.tpu_plan import PlanConfig, cli, main

if __name__ == "__main__":
    cli.run(
        main,
        PlanConfig,
        prog="tpu.plan",
        description="Plan a training run on TPUs or GPUs that you do not have.",
    )
