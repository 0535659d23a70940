"""The calls by which LightGBM can predict every head for every candidate of one decision."""

from __future__ import annotations

import ctypes
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from time import perf_counter_ns

import lightgbm as lgb
import numpy as np
from lightgbm.basic import _LIB, _safe_call
from numpy.typing import NDArray
from scipy import sparse

from calm_serve.prediction import (
    COLUMNS,
    OUTPUT_TOKENS,
    OWN_HEADS,
    SUCCESS,
    Heads,
    SingleRow,
    SparseRow,
    joined,
    live_load,
    own_head,
    probabilities,
)
from calm_serve.types import RoutingContext
from load_tests.decision.world import World

OPTIONS = ("predict_per_row", "predict_batched", "c_dense_row", "c_sparse_row", "c_joined")
FLOAT32 = 0  # C_API_DTYPE_FLOAT32

Values = NDArray[np.float64]  # (candidates, heads)


def summary(nanoseconds: Sequence[int]) -> dict[str, float]:
    """p50, p99 and minimum in microseconds."""
    ordered = sorted(nanoseconds)
    return {
        "p50_us": round(statistics.median(ordered) / 1e3, 2),
        "p99_us": round(ordered[int(len(ordered) * 0.99)] / 1e3, 2),
        "min_us": round(ordered[0] / 1e3, 2),
    }


def tree_counts(world: World) -> dict[str, float]:
    """Trees per head (the mean over SLMs for their own heads); leaves are set by the trainer."""
    heads = Heads(world.artifact)
    trees = {
        name: [b.num_trees() for (head, _), b in heads.own.items() if head == name]
        for name in OWN_HEADS
    }
    if heads.residual is not None:
        trees["ttft_residual"] = [heads.residual.num_trees()]
    return {name: round(statistics.mean(counts), 1) for name, counts in trees.items()}


def measure_lightgbm(world: World, context: RoutingContext, turns: int) -> dict[str, float]:
    """Measure all options in turn; figures by option. Differences are to the first option."""
    calls = _Calls(world, context)
    options: dict[str, Callable[[], Values]] = {name: getattr(calls, name) for name in OPTIONS}
    expected = calls.predict_per_row()
    figures: dict[str, float] = {}
    samples: dict[str, list[int]] = defaultdict(list)
    for name, option in options.items():
        figures[f"{name}.max_difference"] = float(np.max(np.abs(option() - expected)))
    for _ in range(turns):
        for name, option in options.items():
            start = perf_counter_ns()
            option()
            samples[name].append(perf_counter_ns() - start)
    for name, found in samples.items():
        figures |= {f"{name}.{key}": value for key, value in summary(found).items()}
    return figures


class _Calls:
    """One decision's candidates as feature rows, and the calls that predict for them."""

    def __init__(self, world: World, context: RoutingContext) -> None:
        heads, ids = Heads(world.artifact), world.artifact.slm_ids
        # An SLM may have no trees for a head: then nothing beat its start in training.
        whole = {ids[i] for i in range(len(ids)) if all((h, i) in heads.own for h in OWN_HEADS)}
        specs = [s for s in world.fleet.slms if s.id in whole]
        self._context, self._heads = context, heads
        self._candidates = [
            (ids.index(s.id), live_load(context, s, world.states[s.id])) for s in specs
        ]
        self._sparse = SparseRow()
        self._sparse.set_prompt(context.features.numbers, context.features.buckets)
        self._rows = np.zeros((len(specs), COLUMNS), dtype=np.float32)
        for row, candidate in zip(self._rows, self._candidates, strict=True):
            self._sparse.set_candidate(*candidate)
            stored = self._sparse.length.value
            row[self._sparse.columns[:stored]] = self._sparse.values[:stored]
        if heads.residual is None:
            raise RuntimeError("the world's predictor has no head for the TTFT residual")
        self._residual = heads.residual
        self._boosters = [
            (heads.own[SUCCESS, index], heads.own[OUTPUT_TOKENS, index], self._residual)
            for index, _ in self._candidates
        ]
        self._dense_row = np.zeros(COLUMNS, dtype=np.float32)
        calls = {b: _DenseRow(b, self._dense_row) for row in self._boosters for b in row}
        self._dense = [[calls[b] for b in row] for row in self._boosters]
        self._fast = [[SingleRow(b, self._sparse) for b in row] for row in self._boosters]
        keys = [own_head(head, ids[index]) for index, _ in self._candidates for head in OWN_HEADS]
        text, self._places = joined([world.artifact.boosters[key] for key in keys])
        self._load_row = SparseRow()
        self._own_row = SingleRow(lgb.Booster(model_str=text), self._sparse)
        self._residual_row = SingleRow(self._residual, self._load_row)

    def predict_per_row(self) -> Values:
        """`Booster.predict` for every head of every candidate."""
        rows = [self._rows[i : i + 1] for i in range(len(self._rows))]
        return np.array(
            [
                [booster.predict(row, num_threads=1)[0] for booster in boosters]
                for row, boosters in zip(rows, self._boosters, strict=True)
            ]
        )

    def predict_batched(self) -> Values:
        """`Booster.predict`: the residual for all rows at once, each SLM's own heads separately."""
        slms = np.array([index for index, _ in self._candidates], dtype=np.int32)
        rows = sparse.csr_matrix(self._rows)
        success, tokens = (self._heads.of_own(head, rows, slms) for head in OWN_HEADS)
        residuals = self._residual.predict(rows, num_threads=1)
        return np.column_stack([probabilities(success), tokens, residuals])

    def c_dense_row(self) -> Values:
        """The C API with a dense row of 4-byte floats."""
        found = []
        for row, calls in zip(self._rows, self._dense, strict=True):
            self._dense_row[:] = row
            found.append([call.predict() for call in calls])
        return np.array(found)

    def c_sparse_row(self) -> Values:
        """The C API with a sparse row. Includes filling the row."""
        self._sparse.set_prompt(self._context.features.numbers, self._context.features.buckets)
        found = []
        for (index, load), calls in zip(self._candidates, self._fast, strict=True):
            self._sparse.set_candidate(index, load)
            found.append([call.predict()[0] for call in calls])
        return np.array(found)

    def c_joined(self) -> Values:
        """One call for all SLMs' own heads, one per SLM for the residual, as the predictor does."""
        self._sparse.set_prompt(self._context.features.numbers, self._context.features.buckets)
        self._load_row.set_prompt(self._context.features.numbers, ())
        sums = self._own_row.predict()
        own = np.array([sum(sums[p]) for p in self._places]).reshape(-1, len(OWN_HEADS))
        own[:, 0] = 1.0 / (1.0 + np.exp(-own[:, 0]))
        residuals = []
        for index, load in self._candidates:
            self._load_row.set_candidate(index, load)
            residuals.append(self._residual_row.predict()[0])
        return np.column_stack([own, residuals])


class _DenseRow:
    """One booster's call for a dense row at a fixed address."""

    def __init__(self, booster: lgb.Booster, row: NDArray[np.float32]) -> None:
        self._config, self._row = ctypes.c_void_p(), row
        _safe_call(
            _LIB.LGBM_BoosterPredictForMatSingleRowFastInit(
                booster._handle,
                ctypes.c_int(0),
                ctypes.c_int(0),
                ctypes.c_int(-1),
                ctypes.c_int(FLOAT32),
                ctypes.c_int32(len(row)),
                ctypes.c_char_p(b"num_threads=1"),
                ctypes.byref(self._config),
            )
        )
        self._out, self._length = ctypes.c_double(), ctypes.c_int64()
        self._arguments = (
            self._config,
            ctypes.c_void_p(row.ctypes.data),
            ctypes.byref(self._length),
            ctypes.byref(self._out),
        )

    def predict(self) -> float:
        _safe_call(_LIB.LGBM_BoosterPredictForMatSingleRowFast(*self._arguments))
        return self._out.value
