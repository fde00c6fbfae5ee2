"""`serve`, on the command line."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from cnn_jax.cli.arguments import (
    add_command,
    add_ema,
    existing_run,
    positive,
    refuse_overrides,
)

DESCRIPTION = """\
Answers HTTP requests with what is on images, computed in batches, and shows a page
where a person drops an image and sees the classes and where the evidence for them
lies. It runs until SIGTERM or Ctrl-C, and answers what it has accepted before it
ends. It needs the extra: pip install "cnn_jax[serve]"."""

EPILOG = """\
examples:
  %(prog)s --workdir runs/quickstart
  %(prog)s --model clothes.zip --host 0.0.0.0 --port 80
  curl -F image=@shoe.png http://127.0.0.1:8000/v1/predict

  GET /                   the page
  POST /v1/predict?top=5  an image, or several as multipart/form-data: JSON
  POST /v1/explain        an image: PNG with Grad-CAM over it, ?class=NAME
  GET /v1/model           class names, size of the image, preprocessing, limits
  GET /healthz, /readyz   for probes; /metrics for Prometheus

One process uses one device. For several, start one on each, behind a proxy.
Exit code: 0 when stopped, 143 when stopped before it was ready, 2 for a mistake in
the command, 1 for anything else.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "serve",
        run,
        help="answer HTTP requests, and show a page, with what is on images",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--workdir", metavar="RUN", type=existing_run, help="of the run")
    network.add_argument("--model", metavar="FILE", help="StableHLO of export; no Grad-CAM")
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="with --workdir: last, best (by test accuracy) or a step (default: last)",
    )
    add_ema(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument(
        "--port",
        metavar="N",
        type=_between(0, 65535, "an integer from 0 to 65535"),
        default=8000,
        help="0: any that is free (default: 8000)",
    )
    for flag, unit, default, meaning in (
        ("--max-batch", "N", 32, "images computed together"),
        ("--max-waiting", "N", 256, "images under way; more are refused with 429"),
        ("--max-body", "MIB", 10, "size of a request"),
        ("--max-connections", "N", 512, "open at once"),
        ("--timeout", "S", 30, "seconds to send a request, or to be silent between two"),
        ("--stop-timeout", "S", 30, "seconds for what is under way when it is asked to stop"),
        ("--threads", "N", 2, "that decode images"),
    ):
        parser.add_argument(
            flag,
            metavar=unit,
            type=positive,
            default=default,
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--max-delay",
        metavar="MS",
        type=_between(0, 3_600_000, "milliseconds from 0 to 3600000"),
        default=5,
        help="milliseconds that an image waits for others (default: 5)",
    )
    parser.add_argument(
        "--max-pixels",
        metavar="MILLIONS",
        type=_between(1, 89, "an integer from 1 to 89, Pillow's own limit"),
        default=50,
        help="millions of pixels of an image (default: 50)",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    refuse_overrides(options, overrides)
    for flag, given in (("--checkpoint", options.checkpoint), ("--ema", options.ema)):
        if given and not options.workdir:
            options.parser.error(f"{flag}: only with --workdir")
    if options.max_waiting < options.max_batch:
        options.parser.error(
            f"--max-waiting {options.max_waiting}: must be at least --max-batch "
            f"{options.max_batch}, or no batch is full"
        )
    from cnn_jax.commands.serve import Limits, serve

    limits = Limits(
        max_batch=options.max_batch,
        max_delay=options.max_delay / 1000,
        max_waiting=options.max_waiting,
        max_body=options.max_body * 2**20,
        max_pixels=options.max_pixels * 1_000_000,
        max_connections=options.max_connections,
        timeout=options.timeout,
    )
    return serve(
        workdir=options.workdir,
        model=options.model,
        checkpoint=options.checkpoint or "last",
        ema=options.ema,
        host=options.host,
        port=options.port,
        limits=limits,
        num_threads=options.threads,
        stop_timeout=options.stop_timeout,
    )


def _between(low: int, high: int, rule: str) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r}: must be {rule}")
        return int(text)

    return number
