"""``hypersam fetch``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hypersam.cli.main import print_json
from hypersam.errors import InvalidOption
from hypersam.fetch import fetch
from hypersam.sam.registry import VARIANTS, Variant

_UNKNOWN = "it could not be compared, for no published hash of this file is known"
_HOW = {
    "sha256": "the hash is the known one",
    "size": f"{_UNKNOWN}; the size is what the server told",
    "content": f"{_UNKNOWN}; the server told no size, and the file reads as a whole checkpoint",
}


def run_fetch(variant: str, out: Path | None, url: str | None, as_json: bool) -> None:
    """Download with a progress bar, then say what came."""
    row = _row(variant)
    address = url or row.url
    if address is None:
        decoder = " --decoder FILE" if row.two_files else ""
        raise InvalidOption(
            f"no address of {row.title}'s file itself is known: its authors offer it at {row.page}; take it from there "
            f"(out of its archive if it is in one), then: hypersam compress FILE OUT.hsam --variant {row.id}{decoder}; "
            "or give the file's address with --url"
        )
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
    what = f"{found.bytes / 1e6:.2f} MB" + ("" if found.received else ", was there already")
    Console().print(f"{target}: {what}, sha256 {found.sha256} ({_HOW[found.checked]})", soft_wrap=True)


def _row(variant: str) -> Variant:
    for row in VARIANTS:
        if row.id == variant:
            return row
    raise InvalidOption(f"unknown variant {variant!r}; known are {', '.join(v.id for v in VARIANTS)}")
