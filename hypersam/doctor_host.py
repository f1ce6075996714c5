"""What the host gives: memory, a C compiler, a place for compiled kernels."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from hypersam.findings import Finding, broken, fine, warning
from hypersam.settings import GIB, Settings

_SHOWN = 160  # characters of a path


def check_memory(settings: Settings) -> Finding:
    """Compare the memory that is left, by the machine and by the control group, with what models may take."""
    available = available_memory()
    if available is None:
        return fine("memory", "this system does not tell how much is left")
    wanted = settings.resident_bytes + settings.embedding_cache_bytes
    facts = {"available_bytes": available, "wanted_bytes": wanted}
    if available < wanted:
        says = f"{available / GIB:.1f} GiB are left; models and embeddings may take {wanted / GIB:.1f}"
        todo = "lower HYPERSAM_RESIDENT_BYTES or HYPERSAM_EMBEDDING_CACHE_BYTES (what a GPU holds does not count)"
        return warning("memory", says, todo, **facts)
    return fine("memory", f"{available / GIB:.1f} GiB are left", **facts)


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that this process may still take, or None where the system does not tell."""
    left = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    # The second version's names and the first's. Without a limit these read "max" or a number beyond any memory.
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            stat = dict(line.split() for line in (group / used).with_name("memory.stat").read_text().splitlines())
            # Pages of files that nobody looks at are counted as used, and given up when memory is asked for.
            taken = int((group / used).read_text()) - int(stat.get(cached, 0))
            left.append(int((group / limit).read_text()) - taken)
    return min(left, default=None)


def check_compiler(*, needed: bool) -> Finding:
    """Compile an empty Python extension, as Triton does for every kernel's launcher."""
    compiler = os.environ.get("CC") or next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), None)
    bad = broken if needed else warning
    todo = "install gcc and Python's headers (Debian: apt-get install gcc libc6-dev python3-dev)"
    why = "" if needed else " (only Triton on a GPU needs one)"
    if compiler is None or shutil.which(compiler) is None:
        return bad("compiler", f"no C compiler is found{why}", todo)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.c"
            source.write_text("#include <Python.h>\n#include <stdint.h>\nint hypersam_probe(void) { return 0; }\n")
            command = [compiler, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source), "-o",
                       str(source.with_suffix(".so"))]  # fmt: skip
            made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return bad("compiler", f"{compiler} does not run: {error}{why}", todo)
    if made.returncode:
        first = next((line for line in made.stderr.splitlines() if "error" in line), made.stderr.strip()[:200])
        return bad("compiler", f"{compiler} cannot compile a Python extension: {first}{why}", todo)
    return fine("compiler", f"{shutil.which(compiler)} compiles with Python's headers", path=shutil.which(compiler))


def check_kernel_cache() -> Finding:
    """See whether Triton can keep what it compiles."""
    todo = "give it to the user that runs hypersam, or name another in TRITON_CACHE_DIR"
    try:
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton").absolute()
    except RuntimeError:  # a user of no name, as some clusters have, without HOME
        return warning("kernel cache", "this user has no home folder", "name a folder in TRITON_CACHE_DIR")
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            pass
    except OSError as error:
        says = f"{short(folder)} cannot be written: {error.strerror}"
        return warning("kernel cache", says, todo, folder=str(folder))
    return fine("kernel cache", str(folder), folder=str(folder))


def nearest(folder: Path) -> Path:
    """Return the folder, or of those above it the lowest that is there. Raises OSError where that is not told."""
    return next(path for path in (folder, *folder.parents) if there(path))


def short(path: Path) -> str:
    """A path for a line that people read; one may have 4,000 characters."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def there(path: Path) -> bool:
    """Whether there is something. Raises OSError where that is not told: ``exists`` does so in some versions only."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
