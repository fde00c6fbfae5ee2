"""`export`, on the command line."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax.cli.arguments import add_command, add_run, new_file, refuse_overrides

DESCRIPTION = """\
Writes what a run has learned as one file: a function of uint8 images that gives the
probabilities of the classes, for any batch size. JAX alone runs it on CPU, CUDA and
TPU, without this package, or as ONNX onnxruntime; docs/using.md has the lines. It
computes in float32, and is compared with the run before it is written."""

EPILOG = """\
examples:
  %(prog)s --workdir runs/quickstart --to clothes.zip
  %(prog)s --workdir runs/quickstart --checkpoint best --to clothes.zip
  %(prog)s --workdir runs/quickstart --format onnx --to clothes.onnx

Exit code: 0 when done, 2 for a mistake in the command, 1 for anything else.
"""

CHECKED = "random images on the CPU"


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "export",
        run,
        help="write what a run has learned as one file, for use without this package",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_run(parser)
    parser.add_argument(
        "--to", metavar="FILE", type=new_file, required=True, help="the file, which must not exist"
    )
    parser.add_argument(
        "--format",
        type=_format,
        choices=("stablehlo", "onnx"),
        default="stablehlo",
        help="a zip with StableHLO, as jax.export writes it, and a JSON; or an ONNX model "
        "(default: stablehlo)",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    refuse_overrides(options, overrides)
    from cnn_jax.commands.export import export

    path: Path = options.to
    about = export(
        options.workdir,
        path,
        checkpoint=options.checkpoint,
        ema=options.ema,
        form=options.format,
    )
    shape = " x ".join(map(str, about["input"]["shape"]))
    norms = ", BatchNorm folded" if about["batch_norms_folded"] else ""
    where = ", ".join(about["platforms"]) if options.format == "stablehlo" else "onnxruntime"
    print(
        f"{path}: {about['model']} at step {about['step']:,}{norms}, "
        f"{path.stat().st_size:,} bytes\n"
        f"uint8 {shape} to probabilities of {len(about['class_names'])} classes, on {where}\n"
        f"{_compared(about['largest_difference'])}"
    )
    return 0


def _compared(differences: Mapping[str, float]) -> str:
    exact = differences["float32"]
    others = {name: difference for name, difference in differences.items() if name != "float32"}
    if not others:
        return f"within {exact:.1g} of the run's probabilities on {CHECKED}"
    ((precision, difference),) = others.items()
    return (
        f"within {exact:.1g} of the probabilities of the run's weights in float32 on {CHECKED}; "
        f"the run computes in {precision}, and there differs by {difference:.1g}"
    )


def _format(text: str) -> str:
    if text.lower().replace("_", "").replace("-", "") == "savedmodel":
        raise argparse.ArgumentTypeError(
            f"{text!r}: only TensorFlow writes a SavedModel, and it is never imported here; take "
            "stablehlo, which jax.export reads, or onnx, for other servers"
        )
    return text
