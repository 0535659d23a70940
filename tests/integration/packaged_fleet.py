"""The fleet of packaged models as tests serve it: greedy, with tools and two vector spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.integration.served_fleet import ROOT, reference_config


def packaged_config() -> dict[str, Any]:
    """A Serve configuration with one router and four SLMs.

    `smollm2` is SmolLM2 as it is, `tools` the same weights with a chat template that takes tools;
    `minilm` and `other` are MiniLM in two vector spaces.
    """
    packaged = yaml.safe_load((ROOT / "deployments/fleets/packaged.yaml").read_text("utf-8"))
    chat, embed = packaged["slms"]
    # Greedy, so that what a test sees does not change from run to run.
    greedy = {"override_generation_config": {"temperature": 0}}
    chat = {**chat, "engine": greedy}
    tools = {
        **chat,
        "id": "tools",
        "capabilities": {"tools": True},
        "tool_parser": "hermes",
        "engine": {
            **greedy,
            "chat_template": str(Path(__file__).with_name("hermes.jinja")),
            # Not every client can say "strict", and so small a model makes no valid call by itself.
            "tool_strict_level": "parameter",
            # It goes on with blanks where a grammar allows any number of them.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        },
    }
    other = {**embed, "id": "other", "embedding": {"model": "other", "revision": "1"}}
    config = reference_config(two_replicas="")
    args = config["applications"][0]["args"]
    args["fleet"] = {"slms": [chat, tools, embed, other]}
    args["router"]["replicas"] = 1
    return config
