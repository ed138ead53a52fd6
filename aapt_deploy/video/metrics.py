"""Measures of pictures that several rooms take, in NumPy."""

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B (BT.601)
LEAST_SQUARE_ERROR = 1e-9  # equal pictures have 138 dB, not infinitely many


def psnr_db(mean_square_error: float) -> float:
    """Return the PSNR of uint8 pictures with this mean square error."""
    return float(10 * np.log10(255**2 / max(mean_square_error, LEAST_SQUARE_ERROR)))
