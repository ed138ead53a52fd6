"""The attention kernels as TensorRT plugins, in two forms.

python.py          called back from TensorRT in Python, by way of IPluginV3
ahead_of_time.py   compiled into the plan; the plan runs without Python
"""
