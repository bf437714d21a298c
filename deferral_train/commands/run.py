"""`deferral-train run`: every stage for a given pair and prompts."""

from __future__ import annotations

from deferral_train.pipeline.config import RunConfig

# The command line takes every field of the config as a flag and a YAML key.
SETTINGS = RunConfig


def run(
    config: RunConfig, *, fresh: bool = False, probe: bool = False, allow_code_execution: bool = False
) -> int:
    """Run every stage and end in a verdict. A rerun reuses what is finished.

    Args:
        config: see the fields above.
        fresh: start over: remove what an earlier run left in the folder.
        probe: see the ceiling first: a hundred prompts, lossless, the best plug-in rule (chosen on one half, judged on
            the other), hindsight and the cost ratio. A run without it goes on from there.
        allow_code_execution: let the metric python_tests run programs that the models wrote, in isolated processes.
    """
    from deferral_train.evaluation.code import code_execution
    from deferral_train.pipeline.run import run as run_stages

    with code_execution(allow_code_execution):
        run_stages(config, fresh=fresh, probe=probe)
    return 0
