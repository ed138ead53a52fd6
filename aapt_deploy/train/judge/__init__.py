"""How long a generated world stays true.

evaluate.py   fly all candidates, write record, curves and sheets
scores.py     figures by window and second, against true flights
flights.py    which flights are judged
figures.py    sharpness, motion, colour and distance of frames
"""
