"""Single rows through LightGBM's C API, in a sixth of the time of `Booster.predict`.

`Booster.predict` checks, converts and allocates in every call, which costs several times as much as
the trees. Here the row is a buffer of its non-zero values that all boosters read, and the arguments
of every call are built once. Boosters that read the same row are joined into one with several
outputs, so that one call evaluates all of them. `load_tests decision` measures it.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Sequence
from struct import Struct

import lightgbm as lgb
import numpy as np
from lightgbm.basic import _LIB
from numpy.typing import NDArray

from calm_serve.errors import KnowledgeError
from calm_serve.prediction.base import LOAD_NAMES
from calm_serve.requests import BUCKETS, NUMBER_NAMES
from calm_serve.types import FIRST_WORD

FIRST_BUCKET = len(NUMBER_NAMES)
FIRST_LOAD = FIRST_BUCKET + BUCKETS
SLM_COLUMN = FIRST_LOAD + len(LOAD_NAMES)
COLUMNS = SLM_COLUMN + 1
BUCKET_OFFSET = FIRST_BUCKET - FIRST_WORD  # from a bucket's id to its column

# Order inside the buffer: features of the candidate, numbers of the prompt, and last the buckets,
# which vary in number and are all 1.
_CANDIDATE = Struct(f"={1 + len(LOAD_NAMES)}f")
_NUMBERS = Struct(f"={len(NUMBER_NAMES)}f")
_FIXED = 1 + len(LOAD_NAMES) + len(NUMBER_NAMES)
_FLOAT32, _INT32 = 0, 2  # C_API_DTYPE_*
_PREDICT = _LIB.LGBM_BoosterPredictForCSRSingleRowFast


class SparseRow:
    """The non-zero features of one row; single precision, as in training."""

    def __init__(self) -> None:
        self.values: NDArray[np.float32] = np.ones(COLUMNS, dtype=np.float32)
        self.columns: NDArray[np.int32] = np.zeros(COLUMNS, dtype=np.int32)
        self.columns[:_FIXED] = [SLM_COLUMN, *range(FIRST_LOAD, SLM_COLUMN), *range(FIRST_BUCKET)]
        self.starts: NDArray[np.int32] = np.zeros(2, dtype=np.int32)
        self.length = ctypes.c_int64(_FIXED)
        self._buffer = self.values.data.cast("B")
        self.numbers = self.values[_FIXED - len(NUMBER_NAMES) : _FIXED]  # a view

    def set_prompt(self, numbers: Sequence[float], buckets: Sequence[int]) -> None:
        """Write the prompt's features; `numbers` in the order of NUMBER_NAMES."""
        _NUMBERS.pack_into(self._buffer, _CANDIDATE.size, *numbers)
        end = _FIXED + len(buckets)
        self.columns[_FIXED:end] = buckets
        self.columns[_FIXED:end] += BUCKET_OFFSET
        self.starts[1] = self.length.value = end

    @property
    def words(self) -> NDArray[np.int32]:
        """The columns of the prompt's buckets, a view."""
        return self.columns[_FIXED : self.length.value]

    def set_candidate(self, slm_index: int, load: Sequence[float]) -> None:
        """Write one candidate's category, and its load in the order of LOAD_NAMES."""
        _CANDIDATE.pack_into(self._buffer, 0, slm_index, *load)


class SingleRow:
    """Predicts with a booster for the content of a SparseRow. Not thread-safe, because of the row.

    Keeps references to both, because LightGBM keeps only their addresses.
    """

    def __init__(self, booster: lgb.Booster, row: SparseRow) -> None:
        """Prepare the call. Raises KnowledgeError when LightGBM reports an error."""
        self._booster, self._row = booster, row
        config = ctypes.c_void_p()
        _check(
            _LIB.LGBM_BoosterPredictForCSRSingleRowFastInit(
                booster._handle,
                ctypes.c_int(0),  # the objective's own scale
                ctypes.c_int(0),  # from the first tree
                ctypes.c_int(-1),  # to the last
                ctypes.c_int(_FLOAT32),
                ctypes.c_int64(COLUMNS),
                ctypes.c_char_p(b"num_threads=1"),
                ctypes.byref(config),
            )
        )
        weakref.finalize(self, _LIB.LGBM_FastConfigFree, config)
        self.outputs: NDArray[np.float64] = np.zeros(booster.num_model_per_iteration())
        self._out_length = ctypes.c_int64()
        self._arguments = (
            config,
            ctypes.c_void_p(row.starts.ctypes.data),
            ctypes.c_int(_INT32),
            ctypes.c_void_p(row.columns.ctypes.data),
            ctypes.c_void_p(row.values.ctypes.data),
            ctypes.c_int64(len(row.starts)),
            row.length,
            ctypes.byref(self._out_length),
            ctypes.c_void_p(self.outputs.ctypes.data),
        )

    def predict(self) -> NDArray[np.float64]:
        """The result of `Booster.predict` for the row, one value per output.

        The next call overwrites it. Raises KnowledgeError when LightGBM reports an error.
        """
        if status := _PREDICT(*self._arguments):
            _check(status)
        return self.outputs


# A tree that adds 0; fills up the last output of a booster.
_NO_TREE = "num_leaves=1\nnum_cat=0\nleaf_value=0\nis_linear=0\nshrinkage=1\n"
# A larger number needs more filling trees, a smaller one more outputs.
_TREES_PER_OUTPUT = 16


def joined(texts: Sequence[str]) -> tuple[str, list[slice]]:
    """One text model for all in `texts`, and the outputs whose sum is each of them.

    LightGBM stores the trees of a model with several outputs in turns, so every output has equally
    many. The joined models differ in length, so each takes as many outputs of _TREES_PER_OUTPUT
    trees as it needs, and few filling trees are evaluated. Sums are on the scale of the trees,
    because the objectives, which would transform them, are left out.
    """
    head = ""
    outputs: list[list[str]] = []
    places: list[slice] = []
    for text in texts:
        head, *trees = _TREE.split(text.partition("\nend of trees")[0])
        own = [tree.strip("\n") + "\n" for tree in trees]
        own += [_NO_TREE] * (-len(own) % _TREES_PER_OUTPUT)
        first = len(outputs)
        outputs += [own[i : i + _TREES_PER_OUTPUT] for i in range(0, len(own), _TREES_PER_OUTPUT)]
        places.append(slice(first, len(outputs)))
    head = _OUTPUTS.sub(rf"\g<1>={len(outputs)}", _OBJECTIVE.sub("", head)).rstrip("\n")
    inturn = (trees[i] for i in range(_TREES_PER_OUTPUT) for trees in outputs)
    body = "\n".join(f"Tree={i}\n{tree}" for i, tree in enumerate(inturn))
    return f"{head}\n\n{body}\nend of trees\n", places


_TREE = re.compile(r"^Tree=\d+\n", re.MULTILINE)
_OBJECTIVE = re.compile(r"^(?:objective|tree_sizes)=.*\n", re.MULTILINE)
_OUTPUTS = re.compile(r"^(num_class|num_tree_per_iteration)=.*$", re.MULTILINE)


def _check(status: int) -> None:
    if status:
        text: bytes = _LIB.LGBM_GetLastError()  # lightgbm.basic declares its type
        raise KnowledgeError(f"LightGBM: {text.decode(errors='replace')}")
