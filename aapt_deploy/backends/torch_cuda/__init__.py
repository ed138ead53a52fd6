"""PyTorch on an NVIDIA GPU, with our kernels: nothing is built ahead of time.

engine.py      open a bundle's checkpoint, or random weights, as engines
graphs.py      the graphs as engines; their state stays on the GPU
step.py        one pass of the generator, written out for speed
kernels.py     the operations of a pass, as kernels or in plain form
lane.py        streams, events and CUDA graphs
decoder.py     the decoder, one latent frame at a time
calibrate.py   FP8 scales from passes over noise
"""
