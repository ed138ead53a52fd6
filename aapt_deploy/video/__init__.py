"""Frames out, pictures in: the only room that knows codecs.

sinks.py      a Sink is where frames go: a file, a pipe, or a class of your own
packets.py    frames to encoded packets
formats.py    the output formats, one row each
metrics.py    PSNR and luma, the same for every room
pictures.py   read and write pictures, read the frames of a video
"""
