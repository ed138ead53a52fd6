"""What people type and read.

commands.py           the commands: parse, call, report
train.py              `aapt train`
doctor.py             `aapt doctor`
options.py            options that commands share
console.py            progress, warnings and errors on stderr
reports.py            results as tables
standard_streams.py   stdin, stdout and stderr that may be closed, full or left
measure.py            `aapt profile`, `plan`, `diff` and `quality`: what a bundle costs and what a precision loses
"""
