"""``hypersam doctor``."""

from __future__ import annotations

import typer
from rich.console import Console

from hypersam.cli.main import print_json
from hypersam.doctor import examine, worst
from hypersam.findings import Health
from hypersam.settings import Settings

_COLOURS = {Health.FINE: "green", Health.WARNING: "yellow", Health.BROKEN: "bold red"}


def run_doctor(settings: Settings, as_json: bool) -> None:
    """Print what was found, and leave with exit code 1 if something is broken."""
    findings = examine(settings)
    whole = worst(findings)
    if as_json:
        print_json({"health": str(whole), "findings": [finding.as_dict() for finding in findings]})
    else:
        console = Console(soft_wrap=True, highlight=False)
        for finding in findings:
            console.print(f"[{_COLOURS[finding.health]}]{finding.health:8}[/] {finding.part:13} ", end="")
            console.print(finding.says, markup=False)
            if finding.todo is not None:
                console.print(f"{'':23}→ {finding.todo}", markup=False)
    raise typer.Exit(1 if whole is Health.BROKEN else 0)
