"""A plug-in for vLLM: rules, learned heads, shadow mode and trace logging inside the serving engine.

Registered as a ``vllm.general_plugins`` entry point and off unless the engine is started with
``additional_config={"deferral": {...}}``. Importing this package needs no vLLM and changes nothing; `entry.register`
is what the engine calls. See docs/serving_vllm.md.

Reading order: config.py (what a user may say), entry.py (where we are called), checks.py (what is refused at start),
attach.py (what changes in a running engine), blocks.py (the decision, torch only), seam.py (common to the
engine's two runners), then runner_v1.py with sampler_v1.py and runner_v2.py with sampler_v2.py (a step).
"""
