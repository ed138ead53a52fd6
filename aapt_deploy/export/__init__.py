"""From a checkpoint to a bundle.

export.py         write the ONNX graphs and what goes with them
import_.py        published weights into a checkpoint of ours
foreign.py        read published weights, tensor by tensor
text_encoder.py   prompts into vectors
parity.py         how far a graph is from PyTorch
calibrate.py      FP8 scales, calibrated on rollouts
"""
