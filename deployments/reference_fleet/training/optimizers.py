"""The optimizers of the reference fleet's models, and the learning rate over a run."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

WARMUP = 0.02  # share of the minutes
DECAY = 0.5  # share of the minutes in which the rate falls to nothing
EMBEDDING_RATE = 0.15  # peak rate of embeddings and norms, as a share of the layers'


def rate_at(share: float) -> float:
    """Learning rate as a share of its peak, when `share` of the minutes have passed."""
    return min(1.0, max(share / WARMUP, 0.01), max((1 - share) / DECAY, 0.01))


class Optimizers:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""

    def __init__(self, model: PreTrainedModel, rate: float) -> None:
        layers = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        known = {id(p) for p in layers}
        others = [p for p in model.parameters() if id(p) not in known]
        self._all = (
            torch.optim.Muon(layers, lr=rate, weight_decay=0.05),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
        )
        self._peaks = (rate, rate * EMBEDDING_RATE)

    def step(self, share: float) -> None:
        """One step at `share` of the peak rates; clears the gradients."""
        for optimizer, peak in zip(self._all, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        """The states of both optimizers."""
        return [o.state_dict() for o in self._all]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Restores both optimizers."""
        for optimizer, state in zip(self._all, states, strict=True):
            optimizer.load_state_dict(state)
