"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math


def default_lr(d_sae: int) -> float:
    """2e-4 at 2¹⁴ latents, falling with the square root of the width (Gao et al., arXiv 2406.04093, figure 3)."""
    return 2e-4 / math.sqrt(d_sae / 2**14)


def warmup_and_decay(step: int, warmup_steps: int, steps: int | None, decay_share: float) -> float:
    """Factor on the peak learning rate at `step` (from 0): linear up, level, linear down to 0 at the end."""
    factor = min(1.0, (step + 1) / (warmup_steps + 1))
    if steps is not None and decay_share > 0:
        factor = min(factor, max(0.0, (steps - step) / (decay_share * steps)))
    return factor
