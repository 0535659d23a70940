"""A SparseRow written out, for comparison."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calm_serve.prediction import COLUMNS, SparseRow


def dense(sparse: SparseRow) -> NDArray[np.float32]:
    """Return the row as `COLUMNS` values."""
    row: NDArray[np.float32] = np.zeros(COLUMNS, dtype=np.float32)
    stored = sparse.length.value
    row[sparse.columns[:stored]] = sparse.values[:stored]
    return row
