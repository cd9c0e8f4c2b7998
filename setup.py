"""Build the native module where there is a C compiler; install without it where there is none."""

import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("hvdkit", "native", "src")

setup(
    ext_modules=[
        Extension(
            "hvdkit.native._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            # Without fused multiply-add, every variant of a loop gives the same bits. Without errno
            # and trapping comparisons, the compiler can vectorise more of them.
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wall",
                "-Wextra",
            ],
            libraries=["m"] if platform.system() != "Windows" else [],
            optional=True,
        )
    ]
)
