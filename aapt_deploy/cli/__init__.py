"""What people type and read.

commands.py           the commands: parse, call, report
measure.py            `aapt profile`, `plan`, `diff` and `quality`
checkpoints.py        `aapt import` and `prompt`
train.py              `aapt train`
doctor.py             `aapt doctor`
options.py            the options of all commands
console.py            progress, warnings and errors on stderr
reports.py            results as tables
standard_streams.py   stdin, stdout and stderr that may be closed, full or left
"""
