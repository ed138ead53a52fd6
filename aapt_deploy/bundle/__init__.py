"""The bundle: a directory, and the only thing that passes between commands.

bundle.py       the directory: hashed, checked before use, written whole or not at all
files.py        one writer at a time, files whole or not at all
signature.py    the form of a graph: names, shapes, dtypes and state of its tensors
scales.py       FP8 scales of a calibration, and their file
graph_file.py   ONNX files, read and written safely
"""
