"""Check what TensorRT does on this machine, and keep the answers.

ask.py               start one process per question, collect the answers
process.py           one such process
probes.py            the questions
bench.py             build and run a micro-engine, and compare
lean_run.py          run a portable one in TensorRT's lean runtime
cases.py             small graphs with known results, for the questions
smallest_plugin.py   a plugin that only copies: whether plugins work at all
receipts.py          answers kept per GPU and TensorRT, and the form of attention they allow
"""
