"""What the subcommands that need no server do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from hypersam import compression
from hypersam.checkpoint import MAX_KEY, Source, sha256_of
from hypersam.cli.main import print_json
from hypersam.engine import Prompt, check_prompts, check_suits, predict
from hypersam.errors import InvalidOption, NotACheckpoint, PromptError, artifact_errors
from hypersam.images import decode_image
from hypersam.loading import is_artifact, load_model
from hypersam.reports import CompressReport, PlanReport, describe_artifact
from hypersam.sam.detect import detect

_screen = Console(stderr=True)


def _wide() -> Console:
    """For tables of names: a terminal folds them, and a file or another program gets them whole."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 200))


def run_compress(
    source: Path, target: Path, decoder: Path | None, codec: str, variant: str | None, wanted: Mapping[str, Any],
    pairs: list[str], device: str, as_json: bool,
) -> None:  # fmt: skip
    """Compress with a progress bar, then say what came of it."""
    options = {**wanted, **dict(_option(pair) for pair in pairs)}
    with _bar(as_json) as tell:
        report = compression.compress(
            source,
            target,
            decoder=decoder,
            codec=codec,
            variant=variant,
            options=options,
            device=device,
            progress=tell,
        )
    if as_json:
        print_json(report.as_dict())
        return
    table = Table(show_header=False, box=None)
    table.add_row("model", _model(report))
    sizes = f"{report.source_bytes / 1e6:.2f} MB → {report.artifact_bytes / 1e6:.2f} MB"
    table.add_row("size", f"{sizes}, {report.ratio:.2f} times smaller ({report.fp32_ratio:.3f} than as fp32)")
    table.add_row("in memory", f"{report.resident_bytes / 1e6:.2f} MB")
    if report.bits_per_weight is not None and report.sqnr_db is not None:
        table.add_row("encoded", f"{report.bits_per_weight:.3f} bits a weight, SQNR {report.sqnr_db:.2f} dB")
    table.add_row("stored as is", f"{100 * (1 - report.encoded_share):.2f} % of the values")
    if report.fidelity is not None:
        table.add_row("fidelity", _fidelity(report.fidelity))
    table.add_row("time", _times(report.seconds, report.stage_seconds))
    table.add_row("sha256", report.artifact_sha256)
    Console().print(table)
    _print_notices(report.notices)


def run_plan(
    source: Path, decoder: Path | None, codec: str, variant: str | None, wanted: Mapping[str, Any], device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Plan with a progress bar, then list the tensors."""
    with _bar(as_json) as tell:
        report = compression.plan(
            source, decoder=decoder, codec=codec, variant=variant, options=wanted, device=device, progress=tell
        )
    if as_json:
        print_json(report.as_dict())
        return
    listing = Table(
        Column("tensor", overflow="fold"), "shape", "coding", "bits", "SQNR dB", "relative error", "sensitivity"
    )
    for t in report.tensors:
        figures = [f"{t.bits_per_weight:.2f}", *(("" if v is None else f"{v:.4g}")
                   for v in (t.sqnr_db, t.relative_error, t.sensitivity))]  # fmt: skip
        listing.add_row(t.name, "×".join(map(str, t.shape)), t.encoding, *figures)
    _wide().print(listing)
    table = Table(show_header=False, box=None)
    table.add_row("model", _model(report))
    sizes = f"{report.source_bytes / 1e6:.2f} MB → about {report.artifact_bytes / 1e6:.2f} MB"
    table.add_row("size", f"{sizes}, {report.ratio:.2f} times smaller ({report.fp32_ratio:.3f} than as fp32)")
    if report.sqnr_db is not None:
        table.add_row("SQNR", f"{report.sqnr_db:.2f} dB")
    table.add_row("time", _times(report.seconds, report.stage_seconds))
    Console().print(table)
    _print_notices(report.notices)


def _model(report: CompressReport | PlanReport) -> str:
    by = "" if report.decided_by == "shapes" else f" (decided by {report.decided_by})"
    return f"{report.variant}{by}, {report.parameters / 1e6:.2f} M parameters"


def _print_notices(notices: Iterable[str]) -> None:
    for notice in notices:
        Console().print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


def _times(seconds: float, stages: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name} {each:.1f}" for name, each in stages.items())
    return f"{seconds:.2f} s ({parts})"


def _fidelity(report: Mapping[str, Any]) -> str:
    made = report["models"]["compressed"]
    return (
        f"masks' IoU with the original's {100 * made['mask_iou']:.2f} ± {100 * made['margin']:.2f} %, "
        f"embedding's cosine {made['embedding_cosine']:.5f} ({report['prompts']} prompts at {report['side']} pixels)"
    )


def run_decompress(artifact: Path, target: Path, as_json: bool) -> None:
    """Write the dense tensors under the keys of the source, under a temporary name first.

    A prefix that all keys of the source had is given back. What lay around or among its tensors is not, for a
    safetensors file holds tensors alone; of two files it is the one that they make together.
    """
    from safetensors.torch import save_file

    from kernels.artifact import open_artifact

    part = target.with_name(target.name + ".part")
    with artifact_errors(), open_artifact(_existing(artifact), verify=False) as opened:
        prefix = _prefix_of(opened.source)
        state = {prefix + key: value.contiguous() for key, value in opened.state_dict().items()}
    try:
        with open(part, "wb") as made:  # as any file of this user is; the library's own is for nobody else to read
            mode = os.fstat(made.fileno()).st_mode
        save_file(state, part)
        part.chmod(mode)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    if as_json:
        print_json({"tensors": len(state), "bytes": target.stat().st_size, "sha256": sha256_of(target)})
    else:
        Console().print(f"{len(state)} tensors, {target.stat().st_size / 1e6:.2f} MB: {target}")


def _prefix_of(source: Mapping[str, Any]) -> str:
    """Of the source's keys, as the header has it; nothing where that is none that a key could begin with."""
    prefix = source.get("prefix", "")
    return prefix if isinstance(prefix, str) and prefix.isprintable() and len(prefix) < MAX_KEY else ""


def run_inspect(
    file: Path, decoder: Path | None, tensors: bool, report: bool, plot: Path | None, as_json: bool
) -> None:
    """Print what a file holds, or two; with ``report`` or ``plot`` how faithful a compressed model is."""
    found = describe(_existing(file), decoder and _existing(decoder))
    if (report or plot) and found["kind"] != "artifact":
        raise InvalidOption(f"{file.name} is a checkpoint; only a compressed model has a report")
    if plot is not None:
        from hypersam.report_plot import write_plot

        write_plot(found, plot)
    if as_json:
        print_json(found)
        return
    if report:
        _print_report(found)
        return
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        if name not in ("tensors", "config", "fidelity", "notices") and value is not None:
            table.add_row(name, json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    _wide().print(table)
    _print_notices(found["notices"])
    if tensors:
        listing = Table(*(Column(name, overflow="fold") for name in found["tensors"][0]))
        for row in found["tensors"]:
            listing.add_row(*(str(v) for v in row.values()))
        _wide().print(listing)


def _print_report(found: Mapping[str, Any]) -> None:
    from hypersam.report_plot import fidelity_table, tensor_table

    screen = Console()
    screen.print(tensor_table(found))
    if found["fidelity"] is not None:
        screen.print(fidelity_table(found["fidelity"]))
    screen.print(
        f"{found['bytes'] / 1e6:.2f} MB on disk, {found['resident_bytes'] / 1e6:.2f} MB in memory, "
        f"{found['fp32_ratio']:.3f} times smaller than as fp32"
    )


def describe(file: Path, decoder: Path | None = None) -> dict[str, Any]:
    """What ``hypersam inspect`` tells of a checkpoint or artifact, ready for JSON.

    ``decoder``: as ``compress`` takes it; the bytes are those of both files then, the hash is the first one's.
    """
    if is_artifact(file):
        if decoder is not None:
            raise InvalidOption(f"{file.name} is a compressed model, which has its decoder in it")
        return describe_artifact(file)
    source = Source(file, decoder)
    checkpoint = source.read()
    sha256 = sha256_of(file)
    detected = detect(checkpoint.tensors).told(sha256=sha256, name=file.name, two_files=decoder is not None)
    size = source.bytes
    return {
        "kind": "checkpoint", "family": detected.family, "variant": detected.variant,
        "candidates": list(detected.candidates), "decided_by": detected.decided_by,
        "notices": list(detected.doubts), "parameters": checkpoint.parameters, "bytes": size,
        "sha256": sha256, "container": checkpoint.container, "wrapper": checkpoint.wrapper,
        "prefix": checkpoint.prefix, "passed_over": list(checkpoint.passed_over), "config": detected.config.as_dict(),
        "ratio": 1.0, "bits_per_weight": 8 * size / checkpoint.parameters,
        "tensors": [{"name": k, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
                    for k, t in checkpoint.tensors.items()],
    }  # fmt: skip


def run_segment(
    model_file: Path, image_file: Path, points: list[str], box: str | None, out: Path | None,
    multimask: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Segment one picture with one prompt; the best mask goes to ``out``."""
    prompt = _prompt(points, box)
    image = decode_image(_existing(image_file).read_bytes())
    check_prompts([prompt], image.shape[1], image.shape[0])
    model = load_model(_existing(model_file), device=device)
    check_suits([prompt], model)
    masks = predict(model, model.embed(image), [prompt], multimask=multimask)
    best = masks[0]
    if out is not None:
        Image.fromarray(best.mask.astype(np.uint8) * 255).save(out, format="PNG")
    answer = {
        "model": str(model_file), "variant": model.variant, "width": image.shape[1], "height": image.shape[0],
        "masks": [{"score": m.score, "bbox": list(m.bbox), "area": m.area} for m in masks],
        "out": str(out) if out else None,
    }  # fmt: skip
    if as_json:
        print_json(answer)
        return
    x, y, w, h = best.bbox
    Console().print(f"score {best.score:.3f}, {best.area} pixels, box {x},{y} {w}x{h}" + (f": {out}" if out else ""))


def run_eval(file: Path, objects: int, first_scene: int, against: Path | None, device: str, as_json: bool) -> None:
    """Measure mean IoU with a progress bar, then print it by sort of object."""
    from hypersam.evaluate import KINDS, evaluate

    model = load_model(_existing(file), device=device)
    other = load_model(_existing(against), device=device) if against else None
    with Progress(TextColumn("objects"), BarColumn(), TimeRemainingColumn(), console=_screen,
                  disable=as_json) as bar:  # fmt: skip
        task = bar.add_task("objects", total=objects)
        result = evaluate(
            model, objects=objects, first_scene=first_scene, size=256, against=other,
            progress=lambda n: bar.update(task, completed=n),
        )  # fmt: skip
    if as_json:
        print_json(result.as_dict())
        return
    table = Table("objects", "number", *(f"mIoU {kind}" for kind in KINDS))
    rows = {"all": result.miou, **{f"  {name}": scores for name, scores in result.by_sort.items()}}
    if result.against and result.difference and result.agreement:
        rows |= {
            "other model": result.against,
            "difference": result.difference,
            "mask agreement": result.agreement,
        }
    for name, scores in rows.items():
        cells = [f"{100 * scores[k].mean:.2f} ± {100 * scores[k].margin:.2f}" for k in KINDS]
        table.add_row(name, str(scores["box"].objects), *cells)
    Console().print(table)


@contextmanager
def _bar(hidden: bool) -> Iterator[Callable[[compression.Progress], None]]:
    with Progress(TextColumn("{task.description:>10}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                  console=_screen, disable=hidden, transient=True) as bar:  # fmt: skip
        task = bar.add_task("reading", total=None)
        yield lambda p: bar.update(task, description=p.stage, completed=p.done, total=p.total)


def _option(pair: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise InvalidOption(f"--option takes name=value, not {pair!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise InvalidOption(f"--option {name}: {value!r} is not JSON") from error


def _prompt(points: list[str], box: str | None) -> Prompt:
    clicks, labels = [], []
    for text in points:
        numbers = _numbers(text, "--point", (2, 3), "x,y or x,y,label")
        clicks.append((numbers[0], numbers[1]))
        label = numbers[2] if len(numbers) == 3 else 1.0
        if label not in (0.0, 1.0):
            raise PromptError(f"--point {text}: a label is 1 (inside) or 0 (outside)")
        labels.append(int(label))
    corners = None
    if box is not None:
        x0, y0, x1, y1 = _numbers(box, "--box", (4,), "x0,y0,x1,y1")
        corners = (x0, y0, x1, y1)
    return Prompt(points=tuple(clicks), labels=tuple(labels), box=corners)


def _numbers(text: str, flag: str, counts: tuple[int, ...], form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise PromptError(f"{flag} takes {form}, not {text!r}")
    return numbers


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NotACheckpoint(f"there is no file {path}")
    return path
