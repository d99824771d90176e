"""What magnetic resonance suffers: Rician noise, bias field, motion ghosting, Gibbs ringing, spikes.

Artefacts of acquisition are made slice by slice in k-space, as a 2D multi-slice sequence makes them; the bias field is
one smooth field through the whole volume.
"""

from __future__ import annotations

import numpy as np
from numpy.polynomial import legendre

from medsam2.evaluation.corruptions.scene import Corruption, FrameFunction, Scene

# Deviation of both channels, of the full range. BrainWeb (Collins et al. 1998) offers 1 to 9 % of the brightest tissue
RICIAN = (0.03, 0.06, 0.1, 0.15, 0.22)
# Largest log gain. BrainWeb's 20 % and 40 % fields are severities 1 and 2; what comes after is of 7 tesla
BIAS = (0.1, 0.2, 0.4, 0.65, 1.0)
BIAS_DEGREE = 3  # as MONAI's RandBiasField
# Farthest displacement while breathing, of the field of view: 1.4 to 14 mm of 350
GHOSTING = (0.004, 0.009, 0.016, 0.026, 0.04)
BREATHS = 9.0  # cycles while one slice is acquired
GIBBS = (0.7, 0.54, 0.4, 0.28, 0.2)  # share of k-space's radius that is acquired
SPIKES = (0.05, 0.1, 0.17, 0.26, 0.38)  # amplitude of the herringbone, of the full range
SPIKED = 0.6  # share of the slices that a spike falls into


def rician_noise(scene: Scene, severity: int) -> FrameFunction:
    """Magnitude of a complex signal with Gaussian noise in both channels (Gudbjartsson & Patz 1995)."""
    deviation = RICIAN[severity - 1]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        real, imaginary = deviation * scene.own(t).standard_normal((2, scene.height, scene.width, 1), np.float32)
        return np.hypot(frame + real, imaginary)

    return apply


def bias_field(scene: Scene, severity: int) -> FrameFunction:
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
    found = legendre.leggrid3d(coarse if scene.length > 1 else z, coarse, coarse, weights)
    middle, half = (found.max() + found.min()) / 2, max(float(np.ptp(found)) / 2, 1e-6)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        of_slice = legendre.legval(z[t], weights)  # [j, k]: the sum over i
        field = (legendre.leggrid2d(y, x, of_slice) - middle) / half
        return frame * np.exp(BIAS[severity - 1] * field).astype(np.float32)[..., None]

    return apply


def motion_ghosting(scene: Scene, severity: int) -> FrameFunction:
    """Breathing to and fro while the lines of k-space are acquired: ghosts along the phase-encoding direction."""
    farthest = GHOSTING[severity - 1]
    axis = int(scene.shared().integers(2))  # rows or columns
    lines = scene.frames.shape[1 + axis]
    frequency = np.fft.fftfreq(lines) * lines  # cycles over the field of view
    acquired = np.arange(lines) / lines
    order = np.empty(lines)
    order[np.argsort(frequency)] = acquired  # lines are acquired from one end of k-space to the other

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.own(t)  # slices are acquired at other moments of a breath
        phase, cycles = rng.uniform(0, 2 * np.pi), BREATHS * rng.uniform(0.85, 1.15)
        moved = farthest * np.sin(2 * np.pi * cycles * order + phase)
        turn = np.exp(-2j * np.pi * frequency * moved)
        turn = turn[:, None, None] if axis == 0 else turn[None, :, None]
        return np.abs(np.fft.ifft(np.fft.fft(frame, axis=axis) * turn, axis=axis)).astype(np.float32)

    return apply


def gibbs_ringing(scene: Scene, severity: int) -> FrameFunction:
    """The outer part of k-space is not acquired: blur, and ripples beside edges.

    On square slices what MONAI's GibbsNoise does with alpha = 1 - share / sqrt(2), to 4e-7; importing MONAI takes
    seconds, and its cut is a circle whatever the slice's shape.
    """
    ky, kx = 2 * np.fft.fftfreq(scene.height)[:, None], 2 * np.fft.rfftfreq(scene.width)[None]
    acquired = (np.hypot(ky, kx) <= GIBBS[severity - 1])[..., None]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        cut = np.fft.rfft2(frame, axes=(0, 1)) * acquired
        return np.abs(np.fft.irfft2(cut, s=frame.shape[:2], axes=(0, 1))).astype(np.float32)

    return apply


def spikes(scene: Scene, severity: int) -> FrameFunction:
    """A discharge falls into one point of a slice's k-space: stripes over the whole slice (herringbone).

    Written as the wave that such a point is, whose amplitude is a share of the range; MONAI's KSpaceSpikeNoise wants
    the logarithm of the spike, which means something else for every size of slice.
    """
    amplitude = SPIKES[severity - 1]
    y, x = np.arange(scene.height)[:, None], np.arange(scene.width)[None]
    chosen = scene.shared().random(scene.length) < SPIKED
    chosen[scene.length // 2] = True

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        if not chosen[t]:
            return frame
        rng = scene.own(t)
        direction, frequency = rng.uniform(0, np.pi), rng.uniform(0.06, 0.2)  # cycles a pixel
        turn = 2 * np.pi * frequency * (x * np.cos(direction) + y * np.sin(direction)) + rng.uniform(0, 2 * np.pi)
        return np.abs(frame + amplitude * np.cos(turn)[..., None]).astype(np.float32)

    return apply


CORRUPTIONS = (
    Corruption("rician_noise", "medical", rician_noise, ("MR",)),
    Corruption("bias_field", "medical", bias_field, ("MR",)),
    Corruption("motion_ghosting", "medical", motion_ghosting, ("MR",)),
    Corruption("gibbs_ringing", "medical", gibbs_ringing, ("MR",)),
    Corruption("spikes", "medical", spikes, ("MR",)),
)
