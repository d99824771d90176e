"""What magnetic resonance suffers: Rician noise, bias field, motion ghosting, Gibbs ringing, spikes.

Artefacts of acquisition are made slice by slice in k-space, as a 2D multi-slice sequence makes them; the bias field is
one smooth field through the whole volume.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import legendre

from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE, MR = "medical", ("MR",)
BIAS_DEGREE = 3
"""As in MONAI's RandBiasField."""
BREATHS_PER_SLICE = 9.0
"""Cycles of breathing while one slice is acquired."""
SPIKED_SHARE = 0.6
"""Of the slices: a spike falls into them."""


# Deviation of both channels, of the full range. BrainWeb (Collins et al. 1998) offers 1 to 9 % of the brightest tissue
@corruption(SUITE, (0.03, 0.06, 0.1, 0.15, 0.22), MR)
def rician_noise(scene: Scene, deviation: float) -> FrameFunction:
    """Magnitude of a complex signal with Gaussian noise in both channels (Gudbjartsson & Patz 1995)."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        real, imaginary = deviation * scene.own(t).standard_normal((2, scene.height, scene.width, 1), np.float32)
        return np.hypot(frame + real, imaginary)

    return apply


# Largest log gain. BrainWeb's 20 % and 40 % fields are severities 1 and 2; the higher ones are of 7 tesla
@corruption(SUITE, (0.1, 0.2, 0.4, 0.65, 1.0), MR)
def bias_field(scene: Scene, gain: float) -> FrameFunction:
    """Gain that varies smoothly through the volume: exp of a Legendre polynomial (Van Leemput et al. 1999)."""
    size = BIAS_DEGREE + 1
    weights = scene.shared().uniform(-1.0, 1.0, (size, size, size))
    i, j, k = np.indices(weights.shape)
    weights[i + j + k > BIAS_DEGREE] = 0
    weights[0, 0, 0] = 0  # a gain of the whole volume is no bias
    weights[1:] *= 0.5  # coils are long: less changes from slice to slice than within one
    if scene.length == 1:
        weights[1:] = 0
    z, y, x = (np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1) for n in scene.frames.shape[:3])
    coarse = np.linspace(-1.0, 1.0, 13)
    values = legendre.leggrid3d(coarse if scene.length > 1 else z, coarse, coarse, weights)
    middle, half = (values.max() + values.min()) / 2, max(float(np.ptp(values)) / 2, 1e-6)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        of_slice = legendre.legval(z[t], weights)  # [j, k]: the sum over i
        field = (legendre.leggrid2d(y, x, of_slice) - middle) / half
        return frame * np.exp(gain * field).astype(np.float32)[..., None]

    return apply


# Farthest displacement while breathing, as a share of the field of view: 1.4 to 14 mm of 350
@corruption(SUITE, (0.004, 0.009, 0.016, 0.026, 0.04), MR)
def motion_ghosting(scene: Scene, farthest: float) -> FrameFunction:
    """Breathing to and fro while the lines of k-space are acquired: ghosts along the phase-encoding direction."""
    axis = int(scene.shared().integers(2))  # rows or columns
    lines = scene.frames.shape[1 + axis]
    frequency = np.fft.fftfreq(lines) * lines  # cycles over the field of view
    acquired = np.arange(lines) / lines
    order = np.empty(lines)
    order[np.argsort(frequency)] = acquired  # lines are acquired from one end of k-space to the other

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.own(t)  # slices are acquired at other moments of a breath
        phase, cycles = rng.uniform(0, 2 * np.pi), BREATHS_PER_SLICE * rng.uniform(0.85, 1.15)
        moved = farthest * np.sin(2 * np.pi * cycles * order + phase)
        turn = np.exp(-2j * np.pi * frequency * moved)
        turn = turn[:, None, None] if axis == 0 else turn[None, :, None]
        return np.abs(np.fft.ifft(np.fft.fft(frame, axis=axis) * turn, axis=axis)).astype(np.float32)

    return apply


# Share of the radius of k-space that is acquired
@corruption(SUITE, (0.7, 0.54, 0.4, 0.28, 0.2), MR)
def gibbs_ringing(scene: Scene, radius: float) -> FrameFunction:
    """The outer part of k-space is not acquired: blur, and ripples beside edges.

    On square slices what MONAI's GibbsNoise does with alpha = 1 - share / sqrt(2), to 4e-7; importing MONAI takes
    seconds, and its cut is a circle whatever the slice's shape.
    """
    ky, kx = 2 * np.fft.fftfreq(scene.height)[:, None], 2 * np.fft.rfftfreq(scene.width)[None]
    acquired = (np.hypot(ky, kx) <= radius)[..., None]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        cut = np.fft.rfft2(frame, axes=(0, 1)) * acquired
        return np.abs(np.fft.irfft2(cut, s=frame.shape[:2], axes=(0, 1))).astype(np.float32)

    return apply


# Amplitude of the herringbone, of the full range
@corruption(SUITE, (0.05, 0.1, 0.17, 0.26, 0.38), MR)
def spikes(scene: Scene, amplitude: float) -> FrameFunction:
    """A discharge falls into one point of a slice's k-space: stripes over the whole slice (herringbone).

    Written as the wave that such a point is, whose amplitude is a share of the range; MONAI's KSpaceSpikeNoise wants
    the logarithm of the spike, which means something else for every size of slice.
    """
    y, x = np.arange(scene.height)[:, None], np.arange(scene.width)[None]
    spiked = scene.shared().random(scene.length) < SPIKED_SHARE
    spiked[scene.length // 2] = True

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        if not spiked[t]:
            return frame
        rng = scene.own(t)
        direction, frequency = rng.uniform(0, np.pi), rng.uniform(0.06, 0.2)  # cycles a pixel
        turn = 2 * np.pi * frequency * (x * np.cos(direction) + y * np.sin(direction)) + rng.uniform(0, 2 * np.pi)
        return np.abs(frame + amplitude * np.cos(turn)[..., None]).astype(np.float32)

    return apply
