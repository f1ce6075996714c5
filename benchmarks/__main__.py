"""``python -m benchmarks --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import print as show

app = typer.Typer(no_args_is_help=True, add_completion=False)
SMALL_SAM = Path(__file__).parent.parent / "hypersam" / "assets" / "small_sam.pth"


@app.command()
def compression(
    model: Annotated[str, typer.Argument(help="small_sam, sam_vit_b, sam_vit_l, sam_vit_h, or a checkpoint's path.")],
    folder: Annotated[Path, typer.Option(help="Where checkpoints and artifacts are made.")] = Path("build/benchmarks"),
) -> None:
    """Ratio, bits a weight, SQNR, time, memory and the embedding's cosine of one model."""
    from benchmarks import compression as benchmark
    from benchmarks import random_sam

    folder.mkdir(parents=True, exist_ok=True)
    if model == "small_sam":
        path = SMALL_SAM
    elif model.startswith("sam_vit_"):
        path = random_sam.write(model, folder / f"{model}_random.pth")
    else:
        path, model = Path(model), Path(model).stem
    _print(benchmark.run(model, path, folder))


@app.command()
def serving(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to compress and serve.")] = SMALL_SAM,
    requests: Annotated[int, typer.Option(min=3, help="Requests of each kind.")] = 50,
) -> None:
    """Time of POST /segment: cold, new picture, cached embedding, and the service's own share."""
    from benchmarks import serving as benchmark

    _print(benchmark.run(checkpoint, requests))


def _print(row: dict[str, Any]) -> None:
    for name, value in row.items():
        show(f"{name:>26}  {value:.4f}" if isinstance(value, float) else f"{name:>26}  {value}")


if __name__ == "__main__":
    app()
