"""Build and run bundles with ONNX Runtime on a CPU. Running needs neither torch nor onnx.

engine.py   open and run the graphs, with the state in bound buffers
build.py    lower, quantise to int8, choose the number of threads
lower.py    replace our operator by ones that update the cache in place
"""
