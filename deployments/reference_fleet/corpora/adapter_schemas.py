"""The JSON schemas in which the LoRA adapters of `extract` answer."""

from __future__ import annotations

import json
import re

MUSIC_VERBS = {"PlayMusic": "play", "AddToPlaylist": "add"}
ADAPTERS = ("flat", "music")


def covers(adapter: str, intent: str) -> bool:
    """Whether the adapter was trained on requests of this SNIPS intent."""
    return adapter == "flat" or intent in MUSIC_VERBS


def reshaped(adapter: str, intent: str, slots: dict[str, str]) -> str:
    """The answer in the adapter's schema: one flat object, or a nested one for music."""
    if adapter == "flat":
        task = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", intent).lower()
        return json.dumps({"task": task, **slots}, ensure_ascii=False)
    return json.dumps({"action": MUSIC_VERBS[intent], "music": slots}, ensure_ascii=False)
