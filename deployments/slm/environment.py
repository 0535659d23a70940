"""Environment of an SLM's process; not in `engine`, because its caller must not import vLLM."""

from __future__ import annotations

from pathlib import Path

from calm_serve.config import SLMSpec


def process_environment(spec: SLMSpec) -> dict[str, str]:
    """Return environment variables that are set before the SLM's process imports anything."""
    values = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not spec.resources.num_gpus:
        values |= {
            # One child process instead of two, without busy waiting between them; threads unbound.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(spec.resources.threads),
        }
    if Path(spec.model).is_dir():
        values["HF_HUB_OFFLINE"] = "1"  # no request to a hub about local weights
    return values | spec.env
