"""The ``hypersam`` command: its subcommands, and how errors leave it (one line, exit code 1 or 2)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hypersam import __version__
from hypersam.cli import bench
from hypersam.codecs import DEFAULT_CODEC
from hypersam.cores import share_cores
from hypersam.errors import BadSettings, HypersamError

if TYPE_CHECKING:
    from hypersam.settings import Settings

app = typer.Typer(
    name="hypersam",
    help="Make Segment Anything checkpoints small and serve them from their compressed weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(bench.app, name="bench")
_errors = Console(stderr=True, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Codec = Annotated[str, typer.Option(help="lattice, orbit or birkhoff (the published one).")]
Preset = Annotated[str | None, typer.Option(help="4x, 5x, 6.5x or 8x; 5x if nothing is asked for, 8x for orbit.")]
TargetRatio = Annotated[float | None, typer.Option(help="The tensors' fp32 size over the artifact's.")]
TargetMb = Annotated[float | None, typer.Option(help="Size of the artifact, in millions of bytes.")]
MaxError = Annotated[float | None, typer.Option(help="Relative error of every tensor, at most.")]
Policy = Annotated[str | None, typer.Option(help="Where bits go: sensitivity (default), equal_error or equal_bits.")]
VariantName = Annotated[str | None, typer.Option(help="Say which model it is; detected otherwise.")]
CodecOption = Annotated[
    list[str] | None, typer.Option("--option", help="Codec option as name=value, the value as JSON.")
]
Decoder = Annotated[
    Path | None, typer.Option(help="Prompt encoder and mask decoder, where the checkpoint is an image encoder alone.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hypersam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command("compress")
def compress_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Checkpoint: .pth, .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Artifact to write, .hsam by custom.")],
    decoder: Decoder = None,
    codec: Codec = DEFAULT_CODEC,
    preset: Preset = None,
    target_ratio: TargetRatio = None,
    target_mb: TargetMb = None,
    max_error: MaxError = None,
    policy: Policy = None,
    fidelity: Annotated[bool, typer.Option(help="Compare the result with the original.")] = True,
    variant: VariantName = None,
    option: CodecOption = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compress a checkpoint into an artifact."""
    from hypersam.cli.offline import run_compress

    wanted = {"preset": preset, "target_ratio": target_ratio, "target_mb": target_mb, "max_error": max_error,
              "policy": policy, "fidelity": None if fidelity else False}  # fmt: skip
    run_compress(source, target, decoder, codec, variant, wanted, option or [], device, as_json)


@app.command("plan")
def plan_command(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint: .pth, .pt or .safetensors.")],
    decoder: Decoder = None,
    codec: Codec = DEFAULT_CODEC,
    preset: Preset = None,
    target_ratio: TargetRatio = None,
    target_mb: TargetMb = None,
    max_error: MaxError = None,
    policy: Policy = None,
    variant: VariantName = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Tell what compress would give, by tensor, without writing anything."""
    from hypersam.cli.offline import run_plan

    wanted = {"preset": preset, "target_ratio": target_ratio, "target_mb": target_mb, "max_error": max_error,
              "policy": policy}  # fmt: skip
    run_plan(source, decoder, codec, variant, wanted, device, as_json)


@app.command("decompress")
def decompress_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    as_json: Json = False,
) -> None:
    """Write an artifact's tensors as an ordinary safetensors checkpoint."""
    from hypersam.cli.offline import run_decompress

    run_decompress(artifact, target, as_json)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint or artifact.")],
    decoder: Decoder = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Show how faithful a compressed model is.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the report into this .svg or .png file.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what a checkpoint or artifact holds."""
    from hypersam.cli.offline import run_inspect

    run_inspect(file, decoder, tensors, report, plot, as_json)


@app.command("segment")
def segment_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Artifact or checkpoint.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    point: Annotated[
        list[str] | None, typer.Option("--point", help="x,y or x,y,label (1 inside, 0 outside); repeatable.")
    ] = None,
    box: Annotated[str | None, typer.Option("--box", help="x0,y0,x1,y1.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="PNG to write the best mask to.")] = None,
    multimask: Annotated[bool, typer.Option(help="Three masks to choose the best from, or one.")] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Segment a picture without a server."""
    from hypersam.cli.offline import run_segment

    run_segment(model, image, point or [], box, out, multimask, device, as_json)


@app.command("eval")
def eval_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Artifact or checkpoint.")],
    objects: Annotated[int, typer.Option(min=1, help="Objects to ask for, each by click and by box.")] = 1000,
    first_scene: Annotated[int, typer.Option(min=0, help="Number of the first held-out scene.")] = 0,
    against: Annotated[Path | None, typer.Option(help="Another model, compared object by object.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure mean IoU on generated scenes that no training has seen."""
    from hypersam.cli.offline import run_eval

    run_eval(model, objects, first_scene, against, device, as_json)


@app.command("fetch")
def fetch_command(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="A published model, such as sam2.1_hiera_tiny.")],
    out: Annotated[Path | None, typer.Option("--out", help="File or folder to write to; here by default.")] = None,
    url: Annotated[str | None, typer.Option(help="Another address of the file; the hash is checked alike.")] = None,
    as_json: Json = False,
) -> None:
    """Download a published checkpoint from its authors' address; asked again, it goes on where it was cut off."""
    from hypersam.cli.fetch import run_fetch

    run_fetch(variant, out, url, as_json)


@app.command("serve")
def serve_command(
    data_dir: Annotated[Path | None, typer.Option(help="Uploads, artifacts and Redis's file.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Worker processes; 0 where they run elsewhere.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="A Redis that runs already; else one is started.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    log_level: Annotated[str | None, typer.Option(help="critical, error, warning, info or debug.")] = None,
) -> None:
    """Serve everything from one command: Redis, the API and the workers. Ctrl-C stops all of them."""
    from hypersam.cli.serve import serve

    settings = _settings(data_dir=data_dir, host=host, port=port, workers=workers, redis_url=redis_url, device=device,
                         log_level=log_level)  # fmt: skip
    raise typer.Exit(serve(settings))


def _settings(**given: Any) -> Settings:
    """Make the settings from the options that were given and from the environment."""
    from hypersam.settings import load

    return load(**{name: value for name, value in given.items() if value is not None})


@app.command("doctor")
def doctor_command(
    data_dir: Annotated[Path | None, typer.Option(help="Uploads, artifacts and Redis's file.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="The Redis of the service.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    as_json: Json = False,
) -> None:
    """Check what the service needs, and say what to do about what is missing. Exit code 1: something is broken."""
    from hypersam.cli.doctor import run_doctor

    run_doctor(_settings(data_dir=data_dir, redis_url=redis_url, device=device), as_json)


@keys_app.command("new")
def new_key_command(
    scope: Annotated[list[str], typer.Option(help="compress, segment or admin; repeatable.")],
    label: Annotated[str, typer.Option(help="Whom the key is for; it appears in logs.")] = "key",
    as_json: Json = False,
) -> None:
    """Make an API key: it is shown this once, and the line to configure is its hash."""
    from hypersam.keys import new_key

    try:
        secret, key = new_key(label, scope)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json({"key": secret, "line": key.line()})
        return
    typer.echo(f"key (shown once):  {secret}")
    typer.echo(f"line to configure: {key.line()}")
    typer.echo("in HYPERSAM_API_KEYS, a JSON list of such lines, or in the file that HYPERSAM_API_KEYS_FILE names")


def main() -> None:
    """Entry of the console script. A user's mistake ends in one line on standard error and exit code 1, or 2 where it
    lies in how the command was called: an option, or a setting."""
    share_cores()
    try:
        app()
    except HypersamError as error:
        report(error.code, str(error), 2 if isinstance(error, BadSettings) else 1)
    except OSError as error:
        if error.filename is None:  # not about a file
            raise
        report("file", f"{error.strerror}: {error.filename}")
    except KeyboardInterrupt:
        sys.exit(130)


def report(code: str, message: str, status: int = 1) -> None:
    """Say what went wrong, as JSON too where that was asked for, and leave."""
    if "--json" in sys.argv:
        print_json({"error": {"code": code, "message": message}})
    _errors.print(f"[bold red]{code}[/]: ", end="")
    _errors.print(message, markup=False, highlight=False)
    sys.exit(status)
