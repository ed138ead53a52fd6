"""ONNX Runtime on a CPU: neither torch nor onnx at run time.

engine.py   open and run the graphs; state stays in bound buffers
build.py    lower, quantise to int8, choose the number of threads
lower.py    the operator as ONNX Runtime reads it: the cache is updated in place
"""
