"""From a checkpoint to a bundle.

export.py      write the ONNX graphs and what goes with them
parity.py      how far a graph is from PyTorch
calibrate.py   FP8 scales, calibrated on rollouts
"""
