"""Builds the native kernels with the package: one shared library, its hot files once per instruction set.

Everything else is in pyproject.toml. Without a C compiler the package installs all the same: torch computes, and a GPU
cannot be used.
"""

import platform
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("server/kernels/native")
COMMON = ["-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
          "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi", "-g0"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
SOURCES = {"dispatch.c": [], "pool.c": [], "steps.c": [], "transfer.c": [], "isa_baseline.c": []}
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES |= {"isa_avx2.c": AVX2, "isa_avx512.c": AVX512, "isa_amx.c": AMX}
YOUNG = {"isa_amx.c"}
"""Left out where the compiler is too old for them."""


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        def compiled(source: str) -> list[str]:
            with suppress(CompileError) if source in YOUNG else nullcontext():
                flags = [*COMMON, *SOURCES[source]]
                return self.compiler.compile([str(NATIVE / source)], output_dir=self.build_temp, depends=ext.depends,
                                             extra_postargs=flags)  # fmt: skip
            return []

        with ThreadPoolExecutor() as pool:  # each is a process of its own
            objects = [name for names in pool.map(compiled, SOURCES) for name in names]
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), libraries=["m", "pthread"])


setup(
    ext_modules=[
        Extension(
            "server.kernels.native._kernels",
            sources=[str(NATIVE / source) for source in SOURCES],
            depends=[str(path) for path in sorted([*NATIVE.glob("*.h"), *NATIVE.glob("*.inc")])],
            optional=True,
            py_limited_api=True,  # it uses no Python at all: one build is for all versions
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
