"""Artefacts of scanners: of any scanner, of CT, of MR and of ultrasound.

CT: the frames are already windowed to 0..1, so levels are shares of the window: 0.1 of the abdominal window (400 HU) is
40 HU. We chose the levels. Noise of a standard abdominal scan is about 10 HU and doubles at a quarter of the dose (it
grows with one over the square root of the dose).

MR: acquisition artefacts are made slice by slice in k-space, as in a 2D multi-slice sequence; the bias field is one
smooth field through the whole volume.

Ultrasound: the probe is assumed at the upper edge.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.polynomial import legendre

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE, CT, MR = "medical", ("CT",), ("MR",)
TOMOGRAPHY = ("CT", "MR", "PT")
GREY = ("CT", "MR", "PT", "US", "XRAY")
GRAIN_SIGMAS_PX = (1.6, 0.8)
"""Speckle across and along the beam, in pixels of a 224-pixel image: a beam is wider than a pulse is long."""
MAX_AIR_INTENSITY = 0.05
"""Pixels up to this intensity are air, brighter ones the body."""
FINE_SIGMA_PX, COARSE_SIGMA_PX = 0.7, 2.1
"""Band of the CT noise: the ramp filter removes its low frequencies, the reconstruction kernel the highest."""
BIAS_DEGREE = 3
"""Degree of the polynomial, as in MONAI's RandBiasField."""
BREATHS_PER_SLICE = 9.0
"""Breathing cycles while one slice is acquired."""
SPIKED_SLICES_SHARE = 0.6
"""Share of the slices that have a spike."""


# Exponent of the intensities, or one over it: MedMNIST-C (Di Salvo et al. 2024, arXiv 2406.17536) has 1.3 to 2.0
@corruption(SUITE, (1.3, 1.5, 1.8, 2.2, 2.8), GREY)
def contrast_shift(scene: Scene, gamma: float) -> FrameFunction:
    """A gamma curve, as another sequence, contrast phase or gain would change the tissues' intensities.

    Black and white stay; whether the case gets brighter or darker is random.
    """
    exponent = gamma if scene.case_rng().random() < 0.5 else 1 / gamma
    return lambda t, frame: np.power(frame, np.float32(exponent))


# Factor of the slice thickness: the range of TorchIO's RandomAnisotropy (Billot et al. 2020), 1.5 to 5
@corruption(SUITE, (1.5, 2.0, 3.0, 4.0, 5.0), TOMOGRAPHY, ("volume",))
def thick_slices(scene: Scene, thickness: float) -> FrameFunction:
    """Simulate thicker slices and interpolate them back to the grid of the labels.

    A thick slice is the weighted mean of the slices it covers, partly covered ones by their share. A stack thinner than
    one thick slice is averaged as a whole.
    """
    thick = min(thickness, float(scene.length))
    # Thick slices are placed from the middle of the stack outwards, so both ends are treated alike
    count = int(np.ceil(scene.length / thick))
    starts = scene.length / 2 + (np.arange(count) - count / 2) * thick
    centres = starts + thick / 2 - 0.5

    def weights(start: float) -> np.ndarray:
        """Weight of each slice, float64 [T], in the thick slice that begins at `start` (0: upper face of slice 0)."""
        upper = np.arange(scene.length)
        share = np.clip(np.minimum(upper + 1, start + thick) - np.maximum(upper, start), 0, None)
        return share / share.sum()

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        place = float(np.clip(np.interp(t, centres, np.arange(count)), 0, count - 1))
        low = min(int(place), max(count - 2, 0))
        share = (1 - place + low) * weights(starts[low])
        if place > low:
            share = share + (place - low) * weights(starts[low + 1])
        needed = np.flatnonzero(share)
        return np.asarray(sum(np.float32(share[z]) * scene.frame(int(z)) for z in needed), np.float32)

    return apply


# ----------------------------------------------------------------------------------------------------------- ultrasound


# Standard deviation of the factor, as in ImageNet-C's speckle noise (arXiv 1903.12261)
@corruption(SUITE, (0.15, 0.2, 0.35, 0.45, 0.6), ("US",))
def speckle(scene: Scene, deviation: float) -> FrameFunction:
    """Multiplicative noise with the grain of a point spread function; each frame has its own."""
    across, along = (max(0.3, sigma * scene.scale) for sigma in GRAIN_SIGMAS_PX)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        white = scene.frame_rng(t).standard_normal((scene.height, scene.width), np.float32)
        grain = cv2.GaussianBlur(white, (0, 0), sigmaX=across, sigmaY=along)
        return frame * (1 + deviation * grain / max(float(grain.std()), 1e-6))[..., None]

    return apply


# (share of the echo that is lost, width of the shadow as a share of the frame's)
@corruption(SUITE, ((0.35, 0.12), (0.55, 0.15), (0.72, 0.18), (0.85, 0.21), (0.95, 0.24)), ("US",))
def acoustic_shadow(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """A dark wedge below a stone or a rib, which reflects most of the sound; it moves with the probe."""
    lost, width = level
    rng = scene.case_rng()
    centre, top = rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.35)
    pace, sway = rng.uniform(0.02, 0.05) * 2 * np.pi, rng.uniform(0, 2 * np.pi)
    y, x = (np.arange(scene.height)[:, None] + 0.5) / scene.height, (np.arange(scene.width)[None] + 0.5) / scene.width

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        here = centre + 0.06 * np.sin(pace * t + sway)
        half = width / 2 * (0.7 + 0.6 * y)  # beams of a convex probe spread
        spread = (here - 0.5) * 0.3 * (y - top)
        across = 1 / (1 + np.exp((np.abs(x - here - spread) - half) / 0.012))
        below = 1 / (1 + np.exp(-(y - top) / 0.015))
        return np.asarray(frame * (1 - lost * across * below)[..., None], np.float32)

    return apply


# Loss at the lower edge, as the exponent of the attenuation
@corruption(SUITE, (0.5, 0.9, 1.4, 2.0, 2.8), ("US",))
def attenuation(scene: Scene, loss: float) -> FrameFunction:
    """Deep echoes are too weak, as in fatty tissue or with wrong time-gain compensation."""
    depth = (np.arange(scene.height, dtype=np.float32) + 0.5) / scene.height
    gain = np.exp(-loss * depth)[:, None, None]
    return lambda t, frame: frame * gain


# ------------------------------------------------------------------------------------------------------------------- CT


# Standard deviation in the middle of the body, as a share of the window: 16 to 100 HU of 400
@corruption(SUITE, (0.04, 0.07, 0.11, 0.17, 0.25), CT)
def low_dose(scene: Scene, deviation: float) -> FrameFunction:
    """Quantum noise after filtered back-projection: grain in the middle of the body, streaks along its long chords."""

    def grain(rng: np.random.Generator, sigma_x: float, sigma_y: float) -> np.ndarray:
        white = rng.standard_normal((scene.height, scene.width), np.float32)
        sharp = np.asarray(cv2.GaussianBlur(white, (0, 0), sigmaX=sigma_x, sigmaY=sigma_y))
        wider = COARSE_SIGMA_PX / FINE_SIGMA_PX
        noise = sharp - np.asarray(cv2.GaussianBlur(white, (0, 0), sigmaX=sigma_x * wider, sigmaY=sigma_y * wider))
        return np.asarray(noise / max(float(noise.std()), 1e-6), np.float32)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.frame_rng(t)
        body = (fields.luminance(frame) > MAX_AIR_INTENSITY).astype(np.float32)
        depth = fields.wide_blur(body, 0.12 * scene.side)
        rows = body.mean(1, keepdims=True)  # longer chords let fewer photons through
        along = grain(rng, 8.0 * scene.scale + 1.0, FINE_SIGMA_PX) * rows
        noise = (0.25 + 0.75 * depth) * grain(rng, FINE_SIGMA_PX, FINE_SIGMA_PX) + 0.3 * depth * along
        return frame + deviation * noise[..., None]

    return apply


# Shift of the level, as a share of the window
@corruption(SUITE, (0.06, 0.11, 0.17, 0.24, 0.32), CT)
def window_shift(scene: Scene, shift: float) -> FrameFunction:
    """A wrong window level makes the whole case brighter or darker, at random, and clips one end."""
    sign = 1 if scene.case_rng().random() < 0.5 else -1
    return lambda t, frame: frame + np.float32(sign * shift)


# ------------------------------------------------------------------------------------------------------------------- MR


# Standard deviation of both channels, as a share of the range. BrainWeb (Collins et al. 1998) has 1 to 9 % of the
# brightest tissue
@corruption(SUITE, (0.03, 0.06, 0.1, 0.15, 0.22), MR)
def rician_noise(scene: Scene, deviation: float) -> FrameFunction:
    """Magnitude of a complex signal with Gaussian noise in both channels (Gudbjartsson & Patz 1995)."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        real, imaginary = deviation * scene.frame_rng(t).standard_normal((2, scene.height, scene.width, 1), np.float32)
        return np.hypot(frame + real, imaginary)

    return apply


# Largest log gain. BrainWeb's 20 % and 40 % fields are severities 1 and 2; the higher ones occur at 7 tesla
@corruption(SUITE, (0.1, 0.2, 0.4, 0.65, 1.0), MR)
def bias_field(scene: Scene, gain: float) -> FrameFunction:
    """A gain that varies smoothly through the volume: exp of a Legendre polynomial (Van Leemput et al. 1999)."""
    size = BIAS_DEGREE + 1
    weights = scene.case_rng().uniform(-1.0, 1.0, (size, size, size))
    i, j, k = np.indices(weights.shape)
    weights[i + j + k > BIAS_DEGREE] = 0
    weights[0, 0, 0] = 0  # a constant gain is not a bias field
    weights[1:] *= 0.5  # coils are long, so the field changes less between slices than within one
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


# Largest displacement by breathing, as a share of the field of view: 1.4 to 14 mm of 350
@corruption(SUITE, (0.004, 0.009, 0.016, 0.026, 0.04), MR)
def motion_ghosting(scene: Scene, farthest: float) -> FrameFunction:
    """Breathing during the acquisition of k-space lines, which causes ghosts along the phase-encoding direction."""
    axis = int(scene.case_rng().integers(2))  # rows or columns
    lines = scene.frames.shape[1 + axis]
    frequency = np.fft.fftfreq(lines) * lines  # cycles over the field of view
    acquired = np.arange(lines) / lines
    order = np.empty(lines)
    order[np.argsort(frequency)] = acquired  # k-space is acquired from one end to the other

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.frame_rng(t)  # each slice is acquired in another phase of breathing
        phase, cycles = rng.uniform(0, 2 * np.pi), BREATHS_PER_SLICE * rng.uniform(0.85, 1.15)
        displacement = farthest * np.sin(2 * np.pi * cycles * order + phase)
        turn = np.exp(-2j * np.pi * frequency * displacement)
        turn = turn[:, None, None] if axis == 0 else turn[None, :, None]
        return np.abs(np.fft.ifft(np.fft.fft(frame, axis=axis) * turn, axis=axis)).astype(np.float32)

    return apply


# Share of the radius of k-space that is acquired
@corruption(SUITE, (0.7, 0.54, 0.4, 0.28, 0.2), MR)
def gibbs_ringing(scene: Scene, radius: float) -> FrameFunction:
    """The outer part of k-space is not acquired, which causes blur and ripples beside edges.

    On square slices it equals MONAI's GibbsNoise with alpha = 1 - share / sqrt(2), up to 4e-7. It is reimplemented
    since importing MONAI takes seconds and MONAI's mask is a circle even if the slice is not square.
    """
    ky, kx = 2 * np.fft.fftfreq(scene.height)[:, None], 2 * np.fft.rfftfreq(scene.width)[None]
    acquired = (np.hypot(ky, kx) <= radius)[..., None]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        cut = np.fft.rfft2(frame, axes=(0, 1)) * acquired
        return np.abs(np.fft.irfft2(cut, s=frame.shape[:2], axes=(0, 1))).astype(np.float32)

    return apply


# Amplitude of the stripes, as a share of the range
@corruption(SUITE, (0.05, 0.1, 0.17, 0.26, 0.38), MR)
def spikes(scene: Scene, amplitude: float) -> FrameFunction:
    """A discharge corrupts one point of a slice's k-space: stripes over the whole slice (herringbone artefact).

    It is computed as a wave whose amplitude is a share of the range. MONAI's KSpaceSpikeNoise takes the logarithm of
    the spike instead, whose effect depends on the size of the slice.
    """
    y, x = np.arange(scene.height)[:, None], np.arange(scene.width)[None]
    has_spike = scene.case_rng().random(scene.length) < SPIKED_SLICES_SHARE
    has_spike[scene.length // 2] = True

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        if not has_spike[t]:
            return frame
        rng = scene.frame_rng(t)
        direction, frequency = rng.uniform(0, np.pi), rng.uniform(0.06, 0.2)  # cycles per pixel
        turn = 2 * np.pi * frequency * (x * np.cos(direction) + y * np.sin(direction)) + rng.uniform(0, 2 * np.pi)
        return np.abs(frame + amplitude * np.cos(turn)[..., None]).astype(np.float32)

    return apply
