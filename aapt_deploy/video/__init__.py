"""Frames out, pictures in: the only room that knows codecs.

sinks.py      write frames to a file or a pipe, in the formats of one table
pictures.py   read and write pictures, read the frames of a video
metrics.py    PSNR and brightness, the same for every room
"""
