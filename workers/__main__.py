"""``python -m workers``: one worker process, set up by HYPERSAM_* variables."""

from __future__ import annotations

import os
import signal
import sys

from hypersam import doctor, logs
from hypersam.cores import share_cores
from hypersam.embedded_redis import die_with_parent
from hypersam.errors import BadSettings, HypersamError
from hypersam.settings import load
from workers.worker import run


def main() -> int:
    """Work until SIGTERM or SIGINT; a second one gives up the running job, which another worker retries."""
    share_cores()
    try:
        settings = load()
    except BadSettings as error:
        return _ended_by(error)
    logs.configure(settings)
    parent = os.environ.pop("HYPERSAM_PARENT", None)
    if parent is not None:
        # At once: a worker that waits for its job to end would outlive the service by as long.
        die_with_parent(signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before the request above was in force
            return 1
    doctor.log_at_start(settings, "worker")
    try:
        run(settings)
    except HypersamError as error:
        return _ended_by(error)
    return 0


def _ended_by(error: HypersamError) -> int:
    print(f"{error.code}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
