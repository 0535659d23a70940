"""Content gain: how much better choices are, by their own scores, because they read prompts.

Two content-blind choices get the scores of the same decisions: the best single SLM, and random
choices with the shares of the real ones. If routing is no better than these, it has no benefit.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from calm_serve.types import BEST_SCORE_PATHS, Decision

WINDOW_DECISIONS = 512  # that the summary covers
MIN_DECISIONS = 200  # with fewer there is no verdict
MIN_ENTROPY_RATIO = 0.05  # with less, one SLM has nearly all requests: 0.99 of two, 0.992 of five
MIN_GAIN = 0.005  # quality points per decision; less counts as no gain


@dataclass(slots=True)
class _Sums:
    """One SLM over the window. `chosen_*`: of the chosen SLM, where this one was a candidate."""

    chosen: int = 0
    candidate: int = 0
    score: float = 0.0
    quality: float = 0.0
    chosen_score: float = 0.0
    chosen_quality: float = 0.0


@dataclass(frozen=True, slots=True)
class _Choice:
    """What is kept of one decision."""

    chosen: str
    score: float
    quality: float
    best_quality: float
    candidates: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True)
class ContentGain:
    """The window's summary; gains are per decision, in the objective's quality points."""

    decisions: int
    entropy_ratio: float  # of the choices: 0 is one SLM for all, 1 all equally
    gain_best_single: float
    gain_share_matched: float
    quality_gain_share_matched: float  # P(success) alone, without load and cost
    regret: float  # best P(success) among the candidates less the chosen one's
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Why reading prompts gains nothing; "" when it does, or with too few decisions."""
        if self.decisions < MIN_DECISIONS:
            return ""
        if self.entropy_ratio < MIN_ENTROPY_RATIO:
            favourite = max(self.shares, key=self.shares.__getitem__)
            if self.regret < MIN_GAIN:
                return f"{favourite} is best for every prompt"
            return f"{favourite} gets every prompt although others are predicted better for some"
        if self.gain_best_single < MIN_GAIN and self.quality_gain_share_matched < MIN_GAIN:
            return "choices vary, but not with the prompt"
        return ""


class ContentGainMonitor:
    """The last WINDOW_DECISIONS scored decisions of one router; microseconds for each."""

    def __init__(self) -> None:
        self._window: deque[_Choice] = deque()
        self._slms: dict[str, _Sums] = {}
        self._score = self._quality = self._best_quality = 0.0

    def observe(self, decision: Decision) -> None:
        """Count a decision, if it chose the best of several scored candidates."""
        if decision.path not in BEST_SCORE_PATHS:
            return
        scored = [c for c in decision.candidates if c.prediction is not None]
        chosen = next((c for c in scored if c.slm_id == decision.slm_id), None)
        if chosen is None or len(scored) < 2:
            return
        choice = _Choice(
            chosen.slm_id,
            chosen.score,
            chosen.quality,
            max(c.quality for c in scored),
            tuple((c.slm_id, c.score, c.quality) for c in scored),
        )
        self._window.append(choice)
        self._count(choice, 1)
        if len(self._window) > WINDOW_DECISIONS:
            self._count(self._window.popleft(), -1)

    def gains(self) -> ContentGain | None:
        """The window's summary; None before the first decision."""
        count = len(self._window)
        if not count:
            return None
        shares = {i: s.chosen / count for i, s in self._slms.items() if s.chosen}
        # In decisions without the SLM as a candidate, a blind choice of it counts as the actual
        # choice.
        score = {i: s.score + self._score - s.chosen_score for i, s in self._slms.items()}
        quality = {i: s.quality + self._quality - s.chosen_quality for i, s in self._slms.items()}
        blind_score = sum(share * score[i] for i, share in shares.items())
        blind_quality = sum(share * quality[i] for i, share in shares.items())
        entropy = -sum(share * math.log(share) for share in shares.values())
        return ContentGain(
            decisions=count,
            entropy_ratio=round(entropy / math.log(max(len(self._slms), 2)), 4),
            gain_best_single=round((self._score - max(score.values())) / count, 4),
            gain_share_matched=round((self._score - blind_score) / count, 4),
            quality_gain_share_matched=round((self._quality - blind_quality) / count, 4),
            regret=round((self._best_quality - self._quality) / count, 4),
            shares={i: round(share, 3) for i, share in sorted(shares.items())},
        )

    def _count(self, choice: _Choice, sign: int) -> None:
        self._score += sign * choice.score
        self._quality += sign * choice.quality
        self._best_quality += sign * choice.best_quality
        for slm_id, score, quality in choice.candidates:
            sums = self._slms.setdefault(slm_id, _Sums())
            sums.candidate += sign
            sums.score += sign * score
            sums.quality += sign * quality
            sums.chosen_score += sign * choice.score
            sums.chosen_quality += sign * choice.quality
            if not sums.candidate:
                del self._slms[slm_id]
        if chosen := self._slms.get(choice.chosen):
            chosen.chosen += sign
