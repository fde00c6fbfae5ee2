"""Evidence for a class, drawn over the image that the network has seen."""

import math

import cv2
import numpy as np

SIDE = 448
"""Pixels that the shorter side of a drawn image has at least."""

OPACITY = 0.75
"""Of the strongest evidence; where there is none the image is as it is."""


def overlay(pixels: np.ndarray, evidence: np.ndarray) -> bytes:
    """Returns a PNG of uint8 pixels [h, w, 1 or 3] under evidence >= 0 of any size [h, w]."""
    height, width = (side * math.ceil(SIDE / min(pixels.shape[:2])) for side in pixels.shape[:2])
    colours = cv2.COLOR_GRAY2BGR if pixels.shape[-1] == 1 else cv2.COLOR_RGB2BGR
    image = cv2.resize(cv2.cvtColor(pixels, colours), (width, height))
    share = np.asarray(evidence / max(float(evidence.max()), 1e-12), np.float32)
    share = cv2.resize(share, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    heat = cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_INFERNO)
    opacity = OPACITY * share[..., None]
    blended = image * (1 - opacity) + heat * opacity
    _, png = cv2.imencode(".png", blended.astype(np.uint8))
    return png.tobytes()
