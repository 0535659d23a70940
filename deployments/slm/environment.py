"""Environment of an SLM's process. Apart from the engine: applications are built without vLLM."""

from __future__ import annotations

from pathlib import Path

from calm_serve.config import SLMSpec


def process_environment(spec: SLMSpec) -> dict[str, str]:
    """Environment of an SLM's process, set before anything is imported there."""
    values = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not spec.resources.num_gpus:
        values |= {
            # One child instead of two, no busy waiting between them; we bind the threads.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(spec.resources.threads),
        }
    if Path(spec.model).is_dir():
        values["HF_HUB_OFFLINE"] = "1"  # the weights are on disk: ask no hub about them
    return values | spec.env
