"""TensorRT and TensorRT-RTX: lower a bundle's graphs, build plans, check them, run them.

flavour.py           which TensorRT: versions, GPUs and forms of attention of each
loading.py           api.py over the bindings of one flavour
api.py               every call to TensorRT's Python API
api_rtx.py           the calls that only TensorRT-RTX has
interrupt.py         Ctrl-C while a library works
api_lean.py          the calls for portable plans
lean.py              TensorRT or its lean runtime for a portable plan
remedies.py          what TensorRT's messages mean, and what to do
cuda.py              the CUDA driver: memory, streams, graphs
plans.py             what a plan is built with, and what it reads and writes
plan_file.py         what is inside a plan, and whether it belongs on this machine
lower.py             a graph as TensorRT reads it, and what its plan must contain
lower_products.py    products and attention in FP8 and bf16
lower_attention.py   the operator as a plugin node, or in TensorRT's own operators
lower_fp8_attention.py  the operator in its FP8 kernel, over caches of codes
order.py             what a build is for, and checks before any work
build.py             build plans, audit and compare them
kept_plans.py        finished plans of a build that was stopped
rtx.py               the backend tensorrt-rtx
parity.py            compare plans with the graphs they were built from
engine.py            run plans
opening.py           open a bundle's engines, once their plans are checked
state.py             what stays on the GPU between passes: caches, counters, buffers
plugin/              the attention kernels as TensorRT plugins
doctor/              questions to TensorRT, each in a process of its own
"""
