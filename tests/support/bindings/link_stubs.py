"""Shared libraries that hold nothing but names.

TensorRT's Python bindings load over them where TensorRT itself is not installed.

The bindings import nine functions of three libraries and call none of them while they are imported.
A stub has these names; behind each is one instruction that returns zero (or one, for the library
that is merely initialised). A factory that returns zero makes the bindings raise "factory function
returned nullptr", so nothing can pretend to work. The file is written byte by byte, because a test
must not need a compiler.

    page 0   read, execute   ELF header | program headers | symbols | strings | hash table | code
    page 1   read, write     dynamic section, which the loader edits
"""

import platform
import struct
from pathlib import Path

PAGE = 0x10000  # the largest page of the machines below
RETURN = {  # machine -> (ELF number, code that returns 0, code that returns 1)
    "x86_64": (62, bytes.fromhex("31c0c3"), bytes.fromhex("b801000000c3")),
    "aarch64": (183, bytes.fromhex("000080d2c0035fd6"), bytes.fromhex("20008052c0035fd6")),
}
INFER = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "getBuilderPluginRegistry", "getPluginRegistry",
)  # fmt: skip
PARSER = (
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
)
PLUGIN = ("initLibNvInferPlugins",)
LIBRARIES = {
    "libnvinfer": (INFER, 0),
    "libnvonnxparser": (PARSER, 0),
    "libnvinfer_plugin": (PLUGIN, 1),
}  # functions, what they return

HEADER, PROGRAM, SYMBOL, ENTRY = 64, 56, 24, 16  # bytes of each record
LOAD, DYNAMIC, GNU_STACK = 1, 2, 0x6474E551  # program header types
NEEDED_END, HASH, STRTAB, SYMTAB, STRSZ, SYMENT, SONAME = 0, 4, 5, 6, 10, 11, 14  # dynamic tags


def supported() -> bool:
    """Whether stubs can be written for this machine."""
    return platform.system() == "Linux" and platform.machine() in RETURN


def write_all(folder: Path, major: int) -> None:
    """The three libraries of TensorRT `major`, each under its soname, in `folder`."""
    for name, (functions, value) in LIBRARIES.items():
        soname = f"{name}.so.{major}"
        (folder / soname).write_bytes(library(soname, functions, value))


def library(soname: str, functions: tuple[str, ...], value: int) -> bytes:
    """An ELF shared object whose `functions` take anything and return `value`."""
    machine, *codes = RETURN[platform.machine()]
    strings, offsets = b"\0", {}
    for name in (soname, *functions):
        offsets[name] = len(strings)
        strings += name.encode() + b"\0"
    symbols_at = HEADER + 4 * PROGRAM
    strings_at = symbols_at + SYMBOL * (1 + len(functions))
    hash_at = -(-(strings_at + len(strings)) // 8) * 8
    # One bucket, and a chain through all symbols from the last to the first.
    count = 1 + len(functions)
    table = struct.pack(f"<{3 + count}I", 1, count, count - 1, 0, *range(count - 1))
    code_at = -(-(hash_at + len(table)) // 16) * 16
    symbols = bytes(SYMBOL)
    for name in functions:  # global function, defined in section 1, all at the same code
        symbols += struct.pack("<IBBHQQ", offsets[name], 0x12, 0, 1, code_at, len(codes[value]))
    text = _place({symbols_at: symbols, strings_at: strings, hash_at: table, code_at: codes[value]})
    dynamic = b"".join(
        struct.pack("<QQ", tag, entry)
        for tag, entry in (
            (SONAME, offsets[soname]), (HASH, hash_at), (STRTAB, strings_at), (SYMTAB, symbols_at),
            (STRSZ, len(strings)), (SYMENT, SYMBOL),
            (NEEDED_END, 0),
        )
    )  # fmt: skip
    programs = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)
        for kind, flags, at, size, align in (
            (LOAD, 5, 0, len(text), PAGE), (LOAD, 6, PAGE, len(dynamic), PAGE),
            (DYNAMIC, 6, PAGE, len(dynamic), 8), (GNU_STACK, 6, 0, 0, 16),
        )
    )  # fmt: skip
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, HEADER, 0, 0, HEADER, PROGRAM, 4, 0, 0, 0
    )
    return (header + programs + text[symbols_at:]).ljust(PAGE, b"\0") + dynamic


def _place(parts: dict[int, bytes]) -> bytes:
    """`parts` at their offsets, zeros between."""
    image = bytearray(max(at + len(part) for at, part in parts.items()))
    for at, part in parts.items():
        image[at : at + len(part)] = part
    return bytes(image)
