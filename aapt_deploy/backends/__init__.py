"""Turn a bundle into a running engine: build it, open it, choose it by name.

table.py         one row per backend: where it runs, its precisions, who builds and opens it
build.py         choose what to build, and call the backend's builder
trial.py         measure the step time of a new engine and its distance from the reference
sink.py          turn the sink's keys along with the window, on a CPU
cpu.py           cores of this CPU, and whether it adds int8 products exactly
torch_eager.py   the reference engine: the networks in PyTorch, one operation at a time
ort/             ONNX Runtime on a CPU, fp32 and int8
torch_cuda/      PyTorch on an NVIDIA GPU with our kernels, fp8 and bf16
trt/             TensorRT: everything that touches it
"""
