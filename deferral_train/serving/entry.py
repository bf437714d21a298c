"""Entry point ``vllm.general_plugins``: vLLM calls it in each of its processes.

`register` runs in every process of every engine on this installation, ours or not. It wraps two methods that run once
per start; without ``additional_config["deferral"]`` both do nothing more than they did.
"""

from __future__ import annotations

import atexit
import functools
from typing import Any

MARK = "_deferral_train"
_collectors: list[Any] = []


def register() -> None:
    """Called by vLLM in each process; calling it again changes nothing."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _wrap(EngineArgs, "create_engine_config", _checked_config)
    _wrap(WorkerWrapperBase, "init_device", _attached_device)


def _wrap(owner: Any, name: str, make: Any) -> None:
    original = getattr(owner, name)
    if getattr(original, MARK, False):
        return
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, MARK, True)
    setattr(owner, name, wrapped)


def _checked_config(original: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from deferral_train.errors import InputError
        from deferral_train.serving.checks import check_engine, check_heads, configured, forced_runner

        try:
            vllm_config = original(self, *args, **kwargs)
        except ValueError as error:
            line = forced_runner(str(error)) if configured(self) is not None else None
            if line is None:
                raise
            raise InputError(line) from None
        config = configured(vllm_config)
        if config is not None:
            rule = check_engine(vllm_config, config)
            check_heads(rule, vllm_config)
            _warn_version()
            _prepare_front(config, rule)
        return vllm_config

    return create_engine_config


def _warn_version() -> None:
    import logging

    import vllm

    from deferral_train.serving.checks import version_warning

    text = version_warning(vllm.__version__)
    if text is not None:
        logging.getLogger("vllm.deferral_train").warning(text)


def _prepare_front(config: Any, rule: Any) -> None:
    """In the process that talks to users: counters on ``/metrics``, requests checked when they are admitted."""
    import prometheus_client
    from vllm.v1.engine.input_processor import InputProcessor

    from deferral_train.serving.counters import Collector, make_folder, remove_folder

    for (
        earlier
    ) in _collectors:  # of an engine that this process started before: one set of numbers is exported
        prometheus_client.REGISTRY.unregister(earlier)
    folder = make_folder()
    atexit.register(remove_folder, folder)
    _collectors[:] = [Collector(folder)]
    prometheus_client.REGISTRY.register(_collectors[0])
    _wrap(InputProcessor, "process_inputs", _checked_inputs)


def _checked_inputs(original: Any) -> Any:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _admit(self, params)
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _admit(processor: Any, params: Any) -> None:
    """Raises vLLM's own validation error (HTTP 400) for options that the server does not grant."""
    from vllm.exceptions import VLLMValidationError

    from deferral_train.errors import InputError
    from deferral_train.serving.checks import configured
    from deferral_train.serving.config import RequestOptions

    if not hasattr(processor, MARK):
        config = configured(processor.vllm_config)
        setattr(processor, MARK, None if config is None else (config, config.make_rule()))
    granted = getattr(processor, MARK)
    extra = getattr(params, "extra_args", None)
    if granted is not None and extra:
        try:
            RequestOptions.parse(extra).admit(*granted)
        except InputError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _attached_device(original: Any) -> Any:
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        from deferral_train.serving.checks import check_conditions, check_engine, check_heads, configured

        config = configured(self.vllm_config)
        if config is not None:
            import vllm

            from deferral_train.serving.attach import attach

            rule = check_engine(self.vllm_config, config)
            conditions = check_conditions(rule, self.vllm_config, f"vllm {vllm.__version__}")
            mismatch = check_heads(rule, self.vllm_config)
            attach(self.worker, self.vllm_config, config, rule, mismatch, conditions)
        return result

    return init_device
