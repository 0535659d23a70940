"""Ray Serve LLM's own application: `python -m load_tests.peers.ray_serve FILE`, until SIGINT."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from calm_serve.config import SLMSpec
from deployments.slm.environment import process_environment

NODE_CPUS = 16  # so that Ray admits all engines; the machine is shared with the other sides
PREFIX_ROUTER = "ray.serve.llm.request_router.PrefixCacheAffinityRouter"


def document(specs: Sequence[SLMSpec], port: int, *, prefix_aware: bool) -> str:
    """The file that `main` reads: port, and one LLMConfig per SLM with the engine of a replica."""
    return json.dumps({"port": port, "llm_configs": [_llm(s, prefix_aware) for s in specs]})


def _llm(spec: SLMSpec, prefix_aware: bool) -> dict[str, Any]:
    limits = spec.limits
    deployment: dict[str, Any] = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
    if prefix_aware:
        deployment["request_router_config"] = {"request_router_class": PREFIX_ROUTER}
    return {
        "model_loading_config": {"model_id": spec.id, "model_source": spec.model},
        "accelerator_config": {"kind": "cpu"},
        "deployment_config": deployment,
        "runtime_env": {"env_vars": process_environment(spec)},
        "engine_kwargs": {
            "max_model_len": spec.context_tokens,
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "dtype": "bfloat16",
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(spec.resources.kv_cache_bytes),
            "enable_prefix_caching": True,
            "distributed_executor_backend": "uni",
        },
    }


def main() -> int:
    """Serve the application of the file. Returns the exit status."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ray.init(address="local", num_cpus=NODE_CPUS, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": settings["port"]})
    configs = [LLMConfig(**one) for one in settings["llm_configs"]]
    serve.run(build_openai_app({"llm_configs": configs}))
    with suppress(KeyboardInterrupt):
        signal.pause()
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
