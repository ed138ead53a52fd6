"""Check what TensorRT does on this machine, and keep the answers.

ask.py               start one process per question, collect the answers
probes.py            the questions
cases.py             small graphs with known results, for the questions
smallest_plugin.py   a plugin that only copies: whether plugins work at all
receipts.py          answers kept per GPU and TensorRT, and the form of attention they allow
"""
