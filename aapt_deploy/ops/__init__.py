"""Operators: the contract of block-causal attention, and one file per framework.

An op is one name with one file per framework and the same argument order in each. Its package
docstring is its contract. Nothing is imported eagerly: importing the op loads NumPy at most.

TensorRT's plugins are in backends/trt/plugin: their form is TensorRT's, not the op's.

fused.py                  small operations of one pass, in PyTorch
fused_triton.py           the same as Triton kernels
block_causal_attention/   the operator:
  reference.py            the contract in NumPy
  torch_op.py             the contract as a PyTorch operator
  onnx_function.py        the contract as an ONNX function
  triton_op.py            bf16 on a GPU, in Triton
  hopper_fp8.py           the FP8 cache layout of the Hopper kernels
  emulator.py             the kernels' arithmetic in NumPy
  launches.py             ABI, variants and launch shapes of the CUDA kernels
  kernels.py              compile and launch the CUDA kernels
  cuda_op.py              the CUDA kernels as PyTorch operators
"""
