"""How much memory something takes at its peak, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
# VmHWM and not getrusage's maximum, which a child inherits from a large parent.
_AROUND = """
import gc, sys
from pathlib import Path
def _figure(name):
    return next(int(l.split()[1]) << 10 for l in Path("/proc/self/status").read_text().splitlines() if name in l)
{before}
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
_held = _figure("VmRSS")
{measured}
print(_figure("VmHWM") - _held)
"""


def peak_bytes(before: str, measured: str, *arguments: str) -> int:
    """Bytes that ``measured`` takes beyond what is held after ``before``; both find ``arguments`` in ``sys.argv``."""
    script = _AROUND.format(before=before, measured=measured)
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return int(run.stdout.split()[-1])
