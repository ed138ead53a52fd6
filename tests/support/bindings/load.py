"""Make `import tensorrt` find the real bindings of one release over link stubs, for good.

Only this process does.

Only for processes that end with the test: the stubs would shadow a real TensorRT.
"""

import contextlib
import ctypes
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType


def load(folder: Path) -> ModuleType:
    """Load the bindings unpacked in `folder` (wheels.bindings).

    They are the modules `tensorrt` and, once imported, `tensorrt.plugin`.
    """
    sys.modules["tensorrt_libs"] = None  # type: ignore[assignment]  # where the real libraries are installed, they must stay out
    for stub in sorted((folder / "tensorrt_bindings").glob("lib*.so.*")):
        ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    import tensorrt_bindings

    sys.modules["tensorrt"] = tensorrt_bindings
    sys.modules["tensorrt.tensorrt"] = sys.modules["tensorrt_bindings.tensorrt"]
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")  # its docstrings hold invalid escapes
        importlib.import_module("tensorrt.plugin")
    return tensorrt_bindings
