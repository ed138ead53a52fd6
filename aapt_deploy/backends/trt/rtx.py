"""The backend `tensorrt-rtx`: plans for GeForce and RTX GPUs, built on any machine.

Everything is shared with the backend `tensorrt`; flavour.py has what differs.
"""

from functools import partial

from aapt_deploy.backends.trt import build as build_module
from aapt_deploy.backends.trt import opening
from aapt_deploy.backends.trt.flavour import RTX

build = partial(build_module.build, flavour=RTX)
open_bundle = partial(opening.open_bundle, flavour=RTX)
