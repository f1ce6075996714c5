"""``hypersam fetch``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hypersam.cli.main import print_json
from hypersam.errors import InvalidOption
from hypersam.fetch import fetch
from hypersam.sam.registry import VARIANTS, Variant


def run_fetch(variant: str, out: Path | None, url: str | None, as_json: bool) -> None:
    """Download with a progress bar, then say what came."""
    row = _row(variant)
    address = url or row.url
    if address is None:
        known = ", ".join(v.id for v in VARIANTS if v.url)
        raise InvalidOption(f"no address is known for {variant}; give --url, or one of {known}")
    target = Path(row.file) if out is None else out / row.file if out.is_dir() else out
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=as_json, transient=True) as bar:
        task = bar.add_task(target.name, total=None)
        found = fetch(
            address, target, sha256=row.sha256, progress=lambda done, of: bar.update(task, completed=done, total=of)
        )
    if as_json:
        print_json({"variant": row.id, "url": address, **found.as_dict()})
        return
    how = "the hash is the known one" if found.verified else "no hash is known to compare with"
    what = f"{found.bytes / 1e6:.2f} MB" + ("" if found.received else ", was there already")
    Console().print(f"{target}: {what}, sha256 {found.sha256} ({how})", soft_wrap=True)


def _row(variant: str) -> Variant:
    for row in VARIANTS:
        if row.id == variant:
            return row
    raise InvalidOption(f"unknown variant {variant!r}; known are {', '.join(v.id for v in VARIANTS)}")
