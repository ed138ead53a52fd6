"""Run a portable plan in TensorRT's lean runtime: `python -m ... .lean_run FORM PLAN`.

probes.py builds the plan and starts this process, because a process holds one TensorRT. It prints
one line of JSON, as probes.py does.
"""

import json
import sys
from pathlib import Path

from aapt_deploy.backends.trt import cuda
from aapt_deploy.backends.trt.doctor.cases import PORTABLE, WITH_PLUGIN
from aapt_deploy.backends.trt.flavour import LEAN
from aapt_deploy.backends.trt.loading import api_of
from aapt_deploy.errors import AaptError


def answer(form: str, plan: Path, device: cuda.Device) -> dict[str, object]:
    """Run `plan` and compare. Any exception is the answer."""
    api_of(LEAN)  # before bench.py loads it for TensorRT
    from aapt_deploy.backends.trt.doctor import bench as machinery

    def run(bench: machinery.Bench) -> str:
        if form in WITH_PLUGIN:
            machinery.with_plugin(bench)
        case, kind = PORTABLE[form]
        made = case()
        return machinery.check(bench.run(bench.open(plan), made), made, kind)

    return machinery.answer_of(device, run)


def main(form: str, plan: str) -> None:
    try:
        told = answer(form, Path(plan), cuda.with_driver())
    except AaptError as error:
        told = {"ok": False, "found": str(error)}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
