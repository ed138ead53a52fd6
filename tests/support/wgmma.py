"""What wgmma (m64nNk32, e4m3) imposes on the layout: its descriptor and its registers.

The CUDA kernels compute these in C++; here they are in NumPy, for the tests of the layout.
"""

from typing import Any

from aapt_deploy.ops.block_causal_attention.hopper_fp8 import Swizzle


def descriptor(address: int, swizzle: Swizzle) -> int:
    """Shared-memory matrix descriptor of a K-major operand that starts at byte `address`.

    The next 32 bytes along K are at descriptor + 2.

        bits 0-13   address / 16
        bits 16-29  leading byte offset / 16: ignored for swizzled K-major operands, by convention 1
        bits 32-45  stride byte offset / 16: from one group of 8 rows to the next
        bits 49-51  base offset: 0, because tiles are aligned to `swizzle.group_bytes`
        bits 62-63  swizzle
    """
    assert 0 <= address < 1 << 18 and address % 16 == 0, (
        f"{address=} cannot be written into a descriptor"
    )
    return address >> 4 | 1 << 16 | swizzle.group_bytes >> 4 << 32 | swizzle.code << 62


def d_fragment(thread: Any, register: Any) -> tuple[Any, Any]:
    """(row, column) of the 64 x N result in a float32 register.

    `register` is 0 .. N / 2 - 1, `thread` 0 .. 127.
    """
    warp, lane = thread >> 5, thread & 31
    return 16 * warp + (lane >> 2) + 8 * (register >> 1 & 1), 8 * (register >> 2) + 2 * (
        lane & 3
    ) + (register & 1)


def a_fragment(thread: Any, register: Any, byte: Any) -> tuple[Any, Any]:
    """(row, column) of the 64 x 32 operand A in `byte` of a 32-bit register.

    `register` is 0 .. 3, `thread` 0 .. 127.
    """
    warp, lane = thread >> 5, thread & 31
    return 16 * warp + (lane >> 2) + 8 * (register & 1), 16 * (register >> 1) + 4 * (
        lane & 3
    ) + byte


def a_source(half: Any, register: Any, byte: Any) -> Any:
    """Which float32 register of the scores becomes `byte` of `register` of A.

    Keys are 32 * half and following. It is always one of the same thread. So the columns of A are
    not in key order: column c is key kappa(c). V tiles are stored to match.
    """
    return 16 * half + 8 * (register >> 1) + 2 * (register & 1) + 4 * (byte >> 1) + (byte & 1)
