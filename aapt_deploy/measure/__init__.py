"""What a bundle costs and what this machine is. Everything here ends in a record.

latency.py   step latency against the budget, stage by stage
quality.py   what a precision costs, frame by frame
diff.py      two latency records, compared
machine.py   what a record says about the machine it was made on
doctor.py    what this machine can run
"""
