"""``python -m benchmarks --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import print as show

app = typer.Typer(no_args_is_help=True, add_completion=False)
Peers = Annotated[Path | None, typer.Option(help="Python of an environment with other compressors.")]
SMALL_SAM = Path(__file__).parent.parent / "hypersam" / "assets" / "small_sam.pth"


@app.command()
def compression(
    model: Annotated[str, typer.Argument(help="small_sam, a published variant (sam_vit_b), or a checkpoint's path.")],
    codec: Annotated[str, typer.Option(help="lattice, orbit or birkhoff.")] = "lattice",
    preset: Annotated[str | None, typer.Option(help="4x, 5x, 6.5x or 8x; not for birkhoff.")] = None,
    folder: Annotated[Path, typer.Option(help="Where checkpoints and artifacts are made.")] = Path("build/benchmarks"),
) -> None:
    """Ratio, bits a weight, SQNR, time, memory and the embedding's cosine of one model."""
    from benchmarks import compression as benchmark
    from benchmarks import random_sam

    folder.mkdir(parents=True, exist_ok=True)
    if model == "small_sam":
        path = SMALL_SAM
    elif model in random_sam.LAYOUT_OF:
        path = random_sam.write(model, folder / f"{model}_random.pth")
    else:
        path, model = Path(model), Path(model).stem
    options: dict[str, Any] = {"fidelity": False} | ({"preset": preset} if preset else {})
    _print(benchmark.run(model, path, folder, codec, options))


@app.command()
def load(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to compress and serve.")] = SMALL_SAM,
    seconds: Annotated[float, typer.Option(min=1, help="Of clicks on a held picture, at each number of clients.")] = 20,
    pictures: Annotated[int, typer.Option(min=64, help="New pictures at each number of clients.")] = 256,
    requests: Annotated[int, typer.Option(min=10, help="Between two looks at the memory.")] = 20_000,
) -> None:
    """Requests a second and latency at 1, 8 and 64 clients, the service's share, memory, and what batching gains."""
    from benchmarks import load as benchmark

    for row in benchmark.run(checkpoint, seconds, pictures, requests):
        _print(row)
        show("")


@app.command()
def beside_osam(
    python: Annotated[Path, typer.Argument(help="Python of an environment with osam 0.8, fastapi, uvicorn and onnx.")],
    pictures: Annotated[int, typer.Option(min=8, help="New pictures at each number of clients.")] = 12,
    again: Annotated[int, typer.Option(min=8, help="Requests on one picture at each number of clients.")] = 12,
    folder: Annotated[Path, typer.Option(help="Where checkpoints and ONNX files are made.")] = Path("build/benchmarks"),
) -> None:
    """The same requests to osam's server and to this one: new pictures and the same again, at 1 and 8 clients."""
    from benchmarks import beside_osam as benchmark

    for row in benchmark.run(python, folder, pictures, again):
        show(f"{row['kind']:>29}  {row['clients']} clients  {row['server']:>8}  {row['requests_per_s']:7.2f} a second  "
             f"p50 {row['p50_ms']:8.1f} ms  p99 {row['p99_ms']:8.1f} ms  {row['rss_mb']:7.1f} MB resident")  # fmt: skip


@app.command()
def table(
    name: Annotated[str, typer.Argument(help="Of a file in benchmarks/results: load, osam, firstclick.")],
) -> None:
    """A benchmark's newest rows as a table in Markdown."""
    from benchmarks import record

    print(record.markdown(name))


@app.command()
def firstclick(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to compress and serve.")] = SMALL_SAM,
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes of each kind and state.")] = 4,
) -> None:
    """Time from a fresh process to the first mask, cold and warm, by parts."""
    from benchmarks import firstclick as benchmark

    for row in benchmark.run(checkpoint, repeats):
        _print(row)
        show("")


@app.command()
def codecs(
    minilm: Annotated[Path | None, typer.Option(help="A transformer's model.safetensors.")] = None,
    peers: Peers = None,
) -> None:
    """Bits, SQNR and speed of the codecs on the small SAM's matrices, a transformer's, and synthetic rows."""
    from benchmarks import codecs as benchmark

    sources = {"small_sam": benchmark.matrices(SMALL_SAM), **benchmark.synthetic()}
    if minilm is not None:
        sources[minilm.parent.parent.name] = benchmark.matrices(minilm)
    for row in benchmark.run(sources, peers):
        show(f"{row['source']:>12}  {row['method']:40} {row['bits_per_weight']:7.3f} bits  {row['sqnr_db']:6.2f} dB  "
             f"{row['million_per_s']:8.1f} M/s")  # fmt: skip


@app.command()
def trials() -> None:
    """Quantisers that were tried for the codec `lattice` and not taken, beside the one that it has."""
    from benchmarks import trials as benchmark

    for row in benchmark.run():
        show(f"{row['source']:>12}  {row['way']:20} {row['bits_per_weight']:6.3f} bits  {row['sqnr_db']:6.2f} dB  "
             f"{row['gain_db']:+5.2f} dB  {row['million_per_cpu_s']:7.1f} M/s")  # fmt: skip


Objects = Annotated[int, typer.Option(min=10, help="Generated objects to ask for.")]


@app.command()
def allocation(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to compress.")] = SMALL_SAM, objects: Objects = 1000
) -> None:
    """Masks' agreement with the original's at 8 and 10 times smaller, by the policy that deals out the bits."""
    from benchmarks import quality as benchmark

    for row in benchmark.run(checkpoint, objects, goals=benchmark.ALLOCATIONS, table="allocation"):
        _print_quality(row)


@app.command()
def quality(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to compress.")] = SMALL_SAM,
    objects: Objects = 4000,
    peers: Peers = None,
) -> None:
    """Masks of the presets, of the published codec and of other projects' weights against the original's."""
    from benchmarks import quality as benchmark

    for row in benchmark.run(checkpoint, objects, peers):
        _print_quality(row)


@app.command()
def variants(
    names: Annotated[
        list[str] | None, typer.Argument(help="Variants, as in the registry; all of them by default.")
    ] = None,
    goal: Annotated[list[str] | None, typer.Option(help="Such as lattice_5x or birkhoff; all by default.")] = None,
    pictures: Annotated[int, typer.Option(min=1, max=4, help="Carried pictures to segment.")] = 4,
    again: Annotated[bool, typer.Option(help="Measure what has a row of this commit too.")] = False,
    folder: Annotated[Path, typer.Option(help="Where checkpoints and artifacts are made.")] = Path("build/benchmarks"),
) -> None:
    """Size, ratio, bits, SQNR, time and agreement of every variant (random weights) with each codec and preset."""
    from benchmarks import variants as benchmark

    folder.mkdir(parents=True, exist_ok=True)
    for row in benchmark.run(names or [], goal or [], pictures, folder, again=again):
        show(f"{row['variant']:>20}  {row['file_mb']:9.2f} MB, sensitivities of a picture {row['measuring_s']:.1f} s")
        for name in (benchmark.goal_name(*each) for each in benchmark.GOALS):
            if row[f"{name}_mb"] is not None:
                figures = {k: row[f"{name}_{k}"] for k in benchmark.FIGURES}
                show(f"{name:>20}  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))


@app.command()
def variants_table(
    figure: Annotated[
        list[str] | None, typer.Option(help="mb, ratio, bits, sqnr_db, seconds, cosine, mask_iou.")
    ] = None,
) -> None:
    """Print what `variants` measured last as Markdown, a table a figure."""
    from benchmarks import variants as benchmark

    for line in benchmark.table(figure or benchmark.FIGURES):
        print(line)


@app.command()
def gpu(
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, through Triton's interpreter without a GPU.")] = False,
    encoder: Annotated[bool, typer.Option(help="The whole SAM-H encoder too.")] = True,
) -> None:
    """Check and time the kernels on a GPU: SAM's layers beside their peers, and the SAM-H encoder; under 8 minutes."""
    from benchmarks import gpu as benchmark

    for row in benchmark.run(smoke=smoke, encoder=encoder):
        show("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


@app.command()
def gpu_compile() -> None:
    """Compile the shipped kernels for Hopper, GPU or not: matrix instructions, registers, spills."""
    from benchmarks import gpu_compile as benchmark

    for row in benchmark.run():
        show("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


@app.command()
def linear(
    tokens: Annotated[int, typer.Option(min=1, help="Rows of the activations.")] = 4096,
    threads: Annotated[list[int] | None, typer.Option(help="Numbers of threads; default 2 and 1.")] = None,
) -> None:
    """Compressed layers of SAM-B's shapes beside dense ones on the CPU, and the speed of their decoders."""
    from benchmarks import linear as benchmark

    for row in benchmark.run(tokens, tuple(threads or (2, 1))):
        ops = f"{row['torch_ops_m_per_cpu_s']:7.0f}" if row["torch_ops_m_per_cpu_s"] else "      -"
        show(f"{row['out']:>5} x {row['in']:<5} {row['threads']} threads  {row['form']:>8} {row['arithmetic']}  "
             f"{row['cpu_ms']:7.1f} ms CPU  {row['cpu_times_dense']:5.2f} (clock {row['wall_times_dense']:5.2f}) "
             f"x dense  {row['snr_db']:5.1f} dB  "
             f"decode {row['decode_m_per_cpu_s']:7.0f} M/s, torch operations {ops}")  # fmt: skip


@app.command()
def encoder(
    variant: Annotated[str, typer.Option(help="sam_vit_b, sam_vit_l or sam_vit_h.")] = "sam_vit_b",
    peers: Annotated[Path | None, typer.Option(help="Python with torchao, onnx and onnxruntime.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each way, interleaved.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where checkpoints and artifacts are made.")] = Path("build/benchmarks"),
) -> None:
    """The whole image encoder on the CPU: compressed, dense, official, and other projects', in one run."""
    from benchmarks import encoder as benchmark

    for row in benchmark.run(variant, folder, peers, threads, rounds):
        times = "  ".join(
            f"{name.removeprefix('cpu_times_')} x{row[name]:.2f} (clock {row[name.replace('cpu', 'wall', 1)]:.2f})"
            for name in row if name.startswith("cpu_times_") and row[name] != ""
        )  # fmt: skip
        show(f"{row['method']:>24}  {row['wall_s']:6.2f} s, {row['cpu_s']:6.2f} s CPU  {row['weights_mb']:6.1f} MB  "
             f"cosine {row['cosine']:.6f}  {times}")  # fmt: skip


@app.command()
def faults(
    only: Annotated[
        str, typer.Option(help="worker, redis, upload, download, disk, store or clock; all by default.")
    ] = "",
    kills: Annotated[int, typer.Option(min=2, help="Of workers and jobs' processes.")] = 20,
    tries: Annotated[int, typer.Option(min=1, help="Of every other fault.")] = 3,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to compress meanwhile.")] = SMALL_SAM,
) -> None:
    """Kill, fill, cut off and set back what the service needs: jobs lost, half-made files seen, seconds to recover."""
    from benchmarks import faults as benchmark

    show(f"{'fault':>26}  tries  lost  partial  failed  seconds: median  worst")
    bad = 0
    for row in benchmark.run(checkpoint, only, kills, tries):
        if "skipped" in row:
            show(f"{row['fault']:>26}  skipped: {row['skipped']}")
            continue
        bad += row["lost_jobs"] + row["partial_artifacts"]
        show(f"{row['fault']:>26}  {row['tries']:5}  {row['lost_jobs']:4}  {row['partial_artifacts']:7}  "
             f"{row['failed_honestly']:6}  {row['recover_median_s']:15.1f}  {row['recover_worst_s']:5.1f}")  # fmt: skip
    raise typer.Exit(1 if bad else 0)


@app.command()
def families(
    names: Annotated[
        list[str] | None, typer.Argument(help="Variants with an official implementation; one a family by default.")
    ] = None,
    oracles: Annotated[Path, typer.Option(help="Python with the official packages: make oracles.")] = Path(
        ".oracles/bin/python"
    ),
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way, interleaved.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where checkpoints and artifacts are made.")] = Path("build/benchmarks"),
) -> None:
    """Encoder and decoder of every family beside its official implementation: dense, in bf16, compressed."""
    from benchmarks import families as benchmark

    for row in benchmark.run(names or [], folder, oracles.absolute(), threads, rounds):
        if isinstance(row, str):
            show(row)
            continue
        times = "  ".join(
            f"{part} {row[f'{part}_wall_s']:6.3f} s, {row[f'{part}_cpu_s']:6.3f} s CPU, official takes "
            f"x{row[f'{part}_wall_times_official']:.2f} (CPU {row[f'{part}_cpu_times_official']:.2f})"
            for part in ("encoder", "decoder")
        )
        show(f"{row['variant']:>18} {row['method']:>16}  {row['weights_mb']:7.1f} MB  {times}  "
             f"cosine {row['embedding_cosine']:.6f}  logits {row['logits_error']:.1e}")  # fmt: skip


def _print_quality(row: dict[str, Any]) -> None:
    show(f"{row['method']:>20}  {row['fp32_ratio']:5.2f}x  lost {row['point_lost_points']:6.2f} "
         f"(at most {row['point_lost_upper95']:5.2f}) / {row['box_lost_points']:6.2f} "
         f"({row['box_lost_upper95']:5.2f}) points  agreement {row['point_agreement']:.4f} / "
         f"{row['box_agreement']:.4f}")  # fmt: skip


def _print(row: dict[str, Any]) -> None:
    for name, value in row.items():
        show(f"{name:>26}  {value:.4f}" if isinstance(value, float) else f"{name:>26}  {value}")


if __name__ == "__main__":
    app()
