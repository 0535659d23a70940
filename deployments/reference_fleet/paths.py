"""Where the reference fleet's files are. All but RUNS are in the repository."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
MODELS = FOLDER / "models"  # one folder per model: weights, tokenizer, card
EVAL = FOLDER / "eval"  # held-out rows, one JSON lines file per task
PREDICTOR = FOLDER / "predictor" / "predictor.bin"  # shipped with the fleet file
SCORES = FOLDER / "scores.json"  # written by `python -m load_tests fleet`
RUNS = FOLDER / ".runs"  # checkpoints of training; git-ignored
