"""``python -m workers.alive``: exit code 0 if a worker of this host gave a sign of life lately (for health checks)."""

from __future__ import annotations

import contextlib
import socket
import sys

from redis import RedisError

from hypersam.doctor import probe_connection
from hypersam.errors import BadSettings
from hypersam.jobs import JobBoard
from hypersam.settings import load


def main() -> int:
    """Say how many there are. A Redis that is away is not the worker's fault, but nor can it work: 1."""
    try:
        settings = load()
        connection = probe_connection(settings)
    except BadSettings as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"whether a Redis of ours runs cannot be seen: {error}", file=sys.stderr)
        return 1
    if connection is None:
        print("no Redis is configured: give HYPERSAM_REDIS_URL", file=sys.stderr)
        return 1
    with contextlib.closing(connection):
        try:
            count = JobBoard.alive_workers(JobBoard.queue_of(connection), settings, host=socket.gethostname())
        except RedisError as error:
            print(f"Redis does not answer: {error}", file=sys.stderr)
            return 1
    print(f"{count} alive on this host")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
