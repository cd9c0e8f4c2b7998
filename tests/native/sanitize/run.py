"""Run the native module under the sanitizers: python tests/native/sanitize/run.py [--quick]

    threads     arena_threads.c as compiled for use, then with TSan, then with ASan + UBSan
    planted     faults planted in a copy of arena.c: each must be reported, or nothing is watched
    python      the extension with ASan + UBSan, under the Python tests beside this folder

Everything is built in a temporary folder.  The status is 0 only if every part could be run and had
nothing to report.  clang is used as well if it is there.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "hvdkit" / "native" / "src"
LIMIT_SECONDS = 600
PYTHON_LIMIT_SECONDS = 900
TESTS = (
    "native/test_kernels.py",
    "native/test_arena.py",
    "native/test_short_way.py",
    "core/test_gathered.py",
    "core/test_tcp_swap.py",
    "core/test_nodewise.py",
    "core/test_prepared.py",
    "core/test_short.py",
)
LONG_TESTS = ("native/test_arena_stress.py",)

# As in setup.py, where the reasons are.
FLAGS = ("-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
WATCHED = ("-O1", "-g", "-fno-omit-frame-pointer")
BUILDS = {
    "as compiled for use": ("-O3",),
    "TSan": (*WATCHED, "-fsanitize=thread"),
    "ASan + UBSan": (*WATCHED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

SEEDS = ("1", "2", "3", "4", "5")

# The build, what is replaced in arena.c and by what, and what must be reported.
RACE = "ThreadSanitizer: data race"
PLANTED = {
    "begin does not wait [1]": (
        "TSan",
        "return wait_for_all(arena, arena->round - 1);",
        "return HV_OK;",
        RACE,
    ),
    "a relaxed post [2]": (
        "TSan",
        "atomic_store(&own->posted, arena->round);",
        "atomic_store_explicit(&own->posted, arena->round, memory_order_relaxed);",
        RACE,
    ),
    "a relaxed wait [3]": ("TSan", "memory_order_acquire", "memory_order_relaxed", RACE),
    "one slot buffer": (
        "TSan",
        "((arena->round - ago) & 1)",
        "((arena->round - ago) & 0)",
        f"{RACE}|not true",
    ),
    "slots past the end": (
        "ASan + UBSan",
        "2 * slot_stride(slot_bytes));",
        "3 * slot_stride(slot_bytes));",
        "AddressSanitizer: heap-buffer-overflow",
    ),
}


class RunError(Exception):
    """A report of a sanitizer, or something that could not be run."""


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    limit: float = LIMIT_SECONDS,
) -> tuple[int, str]:
    """Return the status and all output; a command that takes too long is a RunError."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **OPTIONS, **(env or {})},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as exc:
        raise RunError(f"not done in {limit} s: {command}") from exc
    if "unexpected memory mapping" in done.stdout and command[0] != "setarch":
        # Older runtimes cannot live with the address space as newer kernels randomise it.
        return run(["setarch", platform.machine(), "-R", *command], env=env, cwd=cwd, limit=limit)
    return done.returncode, done.stdout


def expect_success(command: Sequence[str | Path], **options: object) -> str:
    status, output = run(command, **options)  # type: ignore[arg-type]
    if status:
        raise RunError(f"status {status} of {' '.join(map(str, command))}\n{output[-8000:]}")
    return output


def build_driver(compiler: str, flags: Sequence[str], program: Path, sources: Path) -> None:
    names = ("arena.c", "collectives.c", "kernels.c", "stores.c")
    files = [*(sources / name for name in names), *HERE.glob("*.c"), "-o", program]
    expect_success(
        [compiler, *FLAGS, *flags, "-Wall", "-Wextra", "-pthread", f"-I{sources}", *files, "-lm"],
    )


def can_build(compiler: str, flags: Sequence[str], folder: Path) -> bool:
    """Tell whether the compiler is there and has what the sanitizer needs at run time."""
    if shutil.which(compiler) is None:
        return False
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    return run([compiler, *flags, source, "-o", folder / "empty"])[0] == 0


def threads(folder: Path, quick: bool) -> None:
    for compiler in ("gcc", "clang"):
        for name, flags in BUILDS.items():
            began = time.monotonic()
            if not can_build(compiler, flags, folder):
                if compiler == "gcc":
                    raise RunError(f"gcc cannot build with {' '.join(flags)}")
                print(f"threads, clang, {name}: skipped, for it is not here", flush=True)
                continue
            program = folder / "arena_threads"
            build_driver(compiler, flags, program, SOURCES)
            output = expect_success([program, "1", "20" if quick else "150"])
            took = time.monotonic() - began
            print(
                f"threads, {compiler}, {name}: clean, {output.strip()} ({took:.0f} s)", flush=True
            )


def planted(folder: Path, quick: bool) -> None:
    for name, (build, right, wrong, report) in PLANTED.items():
        copy = folder / "planted"
        shutil.copytree(SOURCES, copy, dirs_exist_ok=True)
        text = (copy / "arena.c").read_text()
        if right not in text:
            raise RunError(f"arena.c has no {right!r} any more: plant {name!r} elsewhere")
        (copy / "arena.c").write_text(text.replace(right, wrong))
        program = folder / "arena_planted"
        build_driver("gcc", BUILDS[build], program, copy)
        for seed in SEEDS:  # a run may end with a wrong answer, before the sanitizer says why
            status, output = run([program, seed, "20" if quick else "150"])
            if status and re.search(report, output):
                break
        else:
            raise RunError(f"{build} did not see the planted fault: {name}\n{output[-8000:]}")
        print(f"planted, {name}: found", flush=True)


def library(name: str) -> str:
    path = Path(expect_success(["gcc", f"-print-file-name={name}"]).strip())
    if not path.is_absolute():
        raise RunError(f"gcc has no {name}")
    return str(path.resolve())


def python(folder: Path, quick: bool) -> None:
    began = time.monotonic()
    package = folder / "package"
    shutil.copytree(
        ROOT / "hvdkit", package / "hvdkit", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    flags = " ".join(BUILDS["ASan + UBSan"])
    destination = ["--build-lib", package, "--build-temp", folder / "objects"]
    expect_success(
        [sys.executable, "setup.py", "--quiet", "build_ext", *destination],
        env={"CC": "gcc", "CFLAGS": flags, "LDFLAGS": flags},
        cwd=ROOT,
    )
    env = {
        "PYTHONPATH": str(package),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONMALLOC": "malloc",  # so that Python's own objects are watched as well
        # The interpreter is not built with ASan, so its runtime must be there first; and the C++
        # library with it, or a C++ exception in some other extension finds no original to call.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # CPython leaves much for the end of the process to free, all of which would be "leaks".
        "ASAN_OPTIONS": OPTIONS["ASAN_OPTIONS"] + ":detect_leaks=0",
    }
    where = expect_success(
        [sys.executable, "-c", "import hvdkit.native._native as n; print(n.__file__)"],
        env=env,
        cwd=package,
    ).strip()
    if not Path(where).is_relative_to(package):
        raise RunError(f"not the module that was built here, but {where}")
    settings = ["-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    tests = [HERE.parents[1] / name for name in (TESTS if quick else TESTS + LONG_TESTS)]
    output = expect_success(
        [sys.executable, "-m", "pytest", "-x", *settings, *tests],
        env=env,
        cwd=package,
        limit=PYTHON_LIMIT_SECONDS,
    )
    last = output.strip().splitlines()[-1]
    print(
        f"python, gcc, ASan + UBSan: clean, {last} ({time.monotonic() - began:.0f} s)", flush=True
    )


PARTS = {"threads": threads, "planted": planted, "python": python}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all if none is named")
    parser.add_argument("--quick", action="store_true", help="fewer random steps")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                PARTS[name](Path(folder), arguments.quick)
            except RunError as exc:
                failed = True
                print(f"{name}: FAILED: {exc}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
