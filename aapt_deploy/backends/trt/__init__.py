"""TensorRT: lower a bundle's graphs, build plans, check them, run them.

api.py               every call to TensorRT's Python API
api_lean.py          the calls for portable plans
lean.py              TensorRT or its lean runtime for a portable plan
remedies.py          what TensorRT's messages mean, and what to do
cuda.py              the CUDA driver: memory, streams, graphs
plan_file.py         what is inside a plan, and whether it belongs on this machine
lower.py             the graphs as TensorRT reads them: FP8 and bf16 products, the form of attention
lower_attention.py   the operator as a plugin node, or in TensorRT's own operators
lower_fp8_attention.py  the operator in its FP8 kernel, over caches of codes
build.py             build plans, keep what is finished, audit and compare them
parity.py            compare plans with the graphs they were built from
engine.py            open plans, check their receipts and run them
state.py             what stays on the GPU between passes: caches, counters, buffers
plugin/              the attention kernels as TensorRT plugins
doctor/              questions to TensorRT, each in a process of its own
"""
