"""Measure pictures: PSNR, and the weights of luma."""

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B (BT.601)


def psnr_db(mean_square_error: float) -> float:
    """Return the PSNR of 8-bit pictures, in dB; at most 138 dB."""
    return float(10 * np.log10(255**2 / max(mean_square_error, 1e-9)))
