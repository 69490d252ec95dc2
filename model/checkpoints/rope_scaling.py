"""Scaled rotary frequencies of a checkpoint: what each frequency is divided by. D head_dim."""

import math

from model.checkpoints.json_file import JsonFile
from model.errors import CheckpointError

KNOWN = ("default", "llama3")


def rope_of(file: JsonFile, default_theta: float, head_dim: int) -> tuple[float, tuple[float, ...]]:
    """rope_theta and the frequencies' divisors (D / 2), none for unscaled ones.

    Old files have `rope_theta` and `rope_scaling`, new ones `rope_parameters` with both. Raises CheckpointError for a
    way of scaling that is not known.
    """
    scaling = file.section("rope_parameters" if file.has("rope_parameters") else "rope_scaling")
    theta = scaling.number("rope_theta", file.number("rope_theta", default_theta))
    for section in (file, scaling):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            section.refuse("partial_rotary_factor", "1.0")
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in KNOWN:
        raise CheckpointError(
            f"{file.path}: rotary positions are scaled by {kind!r}; allowed: {', '.join(KNOWN)}"
        )
    return theta, _llama3_divisors(scaling, theta, head_dim) if kind == "llama3" else ()


def _llama3_divisors(scaling: JsonFile, theta: float, head_dim: int) -> tuple[float, ...]:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones by 1, with a ramp between the two."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    context = scaling.count("original_max_position_embeddings", highest=1 << 24)
    if not low < high:
        scaling.refuse("high_freq_factor", f"above low_freq_factor, {low:g}")
    divisors: list[float] = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)
