"""PyTorch on an NVIDIA GPU, with our kernels: nothing is built ahead of time.

engine.py      open a bundle's checkpoint and run it; the state stays on the GPU
step.py        one pass of the generator, written out for speed
kernels.py     the operations a pass is made of, as kernels or plainly
lane.py        streams, events and CUDA graphs
decoder.py     the decoder, one latent frame at a time
calibrate.py   FP8 scales from passes over noise
"""
