"""What a compiled Triton kernel does with memory, read off its intermediate code."""

import re


def check_accesses(ttir: str, loads: int, stores: int) -> None:
    """Fail if a load or store of a whole tile has no mask, or a load leaves masked values open.

    A masked load without a value of its own is undefined where the mask is false. On a GPU those
    values may be anything, NaN included; the interpreter has zeros there and hides it.
    """
    found = {"load": 0, "store": 0}
    for kind, operands, type_ in re.findall(r"tt\.(load|store) ([^:]+) : ([^\s]+)", ttir):
        found[kind] += 1
        given = len(operands.split("{")[0].split(","))
        whole = "tensor<" in type_
        wanted = {"load": 3 if whole else 1, "store": 3 if whole else 2}[kind]
        assert given == wanted, f"{given} operands of {kind} {operands}"
    assert found == {"load": loads, "store": stores}, found


def check_products(ttir: str, products: int) -> None:
    """Fail if a product of float32 tiles rounds its factors, as a tensor core does by default."""
    lines = [line for line in ttir.splitlines() if "tt.dot " in line]
    assert len(lines) == products, len(lines)
    assert not [line for line in lines if "inputPrecision" in line], lines
