"""`convert`, on the command line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_jax.cli.arguments import add_command, model_name, positive

USAGE = """\
%(prog)s FILE --model NAME --to DIR [--num-classes N] [--argument KEY=VALUE ...]
       [--ignore PART ...] [--conv-biases {fold,zero}]
       %(prog)s DIR --to FILE.safetensors [--layout {torchvision,timm}]"""

DESCRIPTION = """\
Converts weights of torchvision or timm (.safetensors, .pth, .pt) to a directory
that a run can start from, and back. A run's directory will do for DIR: its newest
checkpoint is taken. PyTorch is not needed, and nothing in a file is run. Each
tensor is accounted for: one that is missing, unexpected or of another shape is
an error, and nothing is written then."""

EPILOG = """\
examples:
  %(prog)s resnet50.pth --model resnet50 --to weights/resnet50
  %(prog)s googlenet.pth --model googlenet --ignore aux1 --ignore aux2 --to weights/g
  %(prog)s runs/quickstart --to quickstart.safetensors
  python -m cnn_jax train --config FILE --config.init_from=weights/resnet50 \\
      --config.init_ignore=head,

Biases are all that --conv-biases converts: a network with variant="literal" also
has a ReLU before each addition, and remains another function.
Exit code: 0 when done, 2 for a mistake in the command, 1 for anything else.
"""


def add(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands,
        "convert",
        run,
        help="bring weights from PyTorch, or take them there",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="a file of weights, or a directory"
    )
    parser.add_argument(
        "--to",
        metavar="TARGET",
        type=Path,
        required=True,
        help="a .safetensors file or a directory",
    )
    parser.add_argument(
        "--model", metavar="NAME", type=model_name, help="what a file is for, such as resnet50"
    )
    parser.add_argument(
        "--num-classes",
        metavar="N",
        type=positive,
        help="of the model (default: those of the file)",
    )
    parser.add_argument(
        "--argument",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="another argument of the model, such as width=32; any number of times",
    )
    parser.add_argument(
        "--ignore",
        metavar="PART",
        action="append",
        default=[],
        help="leave a part of the model (head) at random, or tensors of the file (aux1) out; any "
        "number of times",
    )
    parser.add_argument(
        "--conv-biases",
        choices=("fold", "zero"),
        help="fold: the file has biases in front of BatchNorm and the model has none, so take them "
        "into the running means; zero: the reverse, so add biases of 0",
    )
    parser.add_argument(
        "--layout",
        choices=("torchvision", "timm"),
        help="whose names a file gets (default: those that the weights came with)",
    )


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Returns the exit code of the command."""
    if overrides:
        options.parser.error(f"--config.{overrides[0][0]}: not an option of convert")
    pairs = [text.partition("=") for text in options.argument]
    for key, equals, _ in pairs:
        if key == "num_classes" or not equals:
            right = "--num-classes N" if equals else "KEY=VALUE"
            options.parser.error(f"--argument {key}: must be {right}")

    from cnn_jax.commands.convert import convert
    from cnn_jax.config import ConfigError, model_arguments

    texts = [(key, value) for key, _, value in pairs]
    try:
        arguments = model_arguments(options.model, texts) if options.model else dict(texts)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.num_classes:
        arguments["num_classes"] = options.num_classes
    return convert(
        options.source,
        options.to,
        model=options.model,
        arguments=arguments,
        ignore=options.ignore,
        conv_biases=options.conv_biases,
        layout=options.layout,
    )
