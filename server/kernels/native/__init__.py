"""The library of CPU kernels and of copies to a device: found, loaded, and its functions as Python sees them.

Built with the package (setup.py) where there is a C compiler; without it `load` returns None: everything runs in torch,
and a GPU cannot be used. ctypes releases the interpreter's lock during a call, but for those in `SHORT`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging

import torch

log = logging.getLogger("terrace")

ISAS = ("amx", "avx512", "avx2", "baseline")
"""Instruction sets, the best first."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""`enum format` of kernels.h, as far as torch has it."""

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
FUNCTIONS = {
    "terrace_read": (_P, _N, _P, _I),
    "terrace_read_pieces": (_P, _N, _P, _N, _P, _I),
    "terrace_sum": (_P, _N, _P),
    "terrace_rmsnorm": (_P, _P, _F, _P, _N, _N, _I),
    "terrace_qk_rope": (_P, _P, _P, _F, _P, _P, _N, _N, _N, _N, _I),
    "terrace_angles": (_P, _P, _F, _P, _P, _N, _N, _I),
    "terrace_argmax": (_P, _P, _N, _N, _I),
    "terrace_choose": (_P, _P, _P, _P, _N, _N, _P, _I),
    "terrace_describe": (_P, _P, _N, _P, _I),
    "terrace_attention_plan": (_P,),
    "terrace_attend": (_P, _N, _N, *(_P, _N, _N) * 3, _P),
    "terrace_pack": (_P, _P, _I, _N, _N, _N, _I),
    "terrace_rows": (_P, _P, _N, _P, _N, _I),
    "terrace_linear": (_P, _P, _N, _P, _N, _N, _I, _P, _I),
    "terrace_decode": (_P,) * 5,
    "terrace_wait": (_N,),
    "terrace_link": (_P,),
}
"""Name -> argument types, as in kernels.h and transfer.h. Tensors go as `tensor.data_ptr()`."""
SIZES = {
    "terrace_matrix_bytes": (_P,),
    "terrace_linear_scratch": (_P, _N, _I),
    "terrace_choose_scratch": (_N, _I),
    "terrace_decode_scratch": (_P, _P, _N),
    "terrace_begin": (_P,),
}
"""Likewise, of those that return a number of bytes, or of a step."""
CODES = {
    "terrace_up": (_P, _P),
    "terrace_down": (_P, _P),
    "terrace_copy": (_P, _P),
}
"""Likewise, of those that return a driver's error, or 0."""
SHORT = ("terrace_attention_plan", *SIZES)
"""Calls that keep the interpreter's lock: they take less time than giving it up and waiting for it again."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library with its best instruction set chosen; None, and one line in the log, where there is none."""
    found = importlib.util.find_spec("server.kernels.native._kernels")
    if found is None or found.origin is None:
        log.info("the native kernels were not built (no C compiler at installation): torch computes instead")
        return None
    try:
        library, keeping = ctypes.CDLL(found.origin), ctypes.PyDLL(found.origin)
    except OSError as error:
        log.warning("the native kernels cannot be loaded (%s): torch computes instead", error)
        return None
    library.terrace_select.restype = ctypes.c_char_p
    library.terrace_select.argtypes = (ctypes.c_char_p,)
    for table, result in ((FUNCTIONS, None), (SIZES, _N), (CODES, _I)):
        for name, types in table.items():
            function = getattr(keeping if name in SHORT else library, name)
            function.argtypes, function.restype = types, result
            setattr(library, name, function)
    select(library, "auto")
    return library


def select(library: ctypes.CDLL, wanted: str) -> str:
    """Choose an instruction set, or the best with "auto"; the name of it. ValueError where this machine lacks it."""
    chosen = library.terrace_select(wanted.encode())
    if chosen is None:
        raise ValueError(f"this machine has no {wanted!r}; instruction sets are {', '.join(ISAS)} and auto")
    return str(chosen.decode())
