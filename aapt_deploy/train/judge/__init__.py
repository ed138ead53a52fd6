"""How long a generated world stays true.

evaluate.py   fly, measure, compare, report
flights.py    which flights are judged
figures.py    sharpness, motion, colour and distance of frames
"""
