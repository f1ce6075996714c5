"""``hypersam bench``: measurements on the machine at hand that the product itself uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hypersam.errors import Unavailable

app = typer.Typer(no_args_is_help=True, help="Measure this machine.")
_screen = Console(stderr=True, soft_wrap=True)


@app.command("tune")
def tune_command(
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    form: Annotated[
        list[str] | None, typer.Option("--form", help="birkhoff, lattice, orbit3 … orbit6; repeatable; all if none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Table to write; default: the one that is read first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Time all ways to multiply with compressed weights on a GPU; later runs take the fastest. Takes minutes."""
    import torch

    from hypersam.cli.main import print_json
    from hypersam.errors import InvalidOption
    from hypersam.loading import resolve_device

    place = resolve_device(device)
    if place.type != "cuda":
        raise Unavailable(f"only a CUDA device can be tuned for, not {device}")
    from kernels.hyperlinear.gpu import paths, tune

    if unknown := sorted(set(form or ()) - set(paths.FORMS)):
        raise InvalidOption(f"unknown form {unknown[0]!r}; give {', '.join(paths.FORMS)}")
    target = out or paths.user_file()
    with torch.cuda.device(place):
        entries = tune.measure(place, forms=form or paths.FORMS, tell=lambda text: _screen.print(text, highlight=False))
    name = torch.cuda.get_device_name(place)
    tune.write(target, name, entries)
    if as_json:
        print_json({"device": name, "table": str(target), "entries": [entry.as_dict() for entry in entries]})
        return
    _screen.print(f"wrote {target}", highlight=False)
