"""The command line that the contestants' scripts share: MODEL CALIBRATION, what the tool is told, OUTPUT, --threads."""

import argparse
from pathlib import Path


def make_parser(description: str, **settings: type) -> argparse.ArgumentParser:
    """A parser with the shared arguments; `settings` are the positional ones between CALIBRATION and OUTPUT."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face model folder")
    parser.add_argument("calibration", type=Path, help="safetensors with `input_ids` (n, T) int64; AutoRound: texts")
    for name, kind in settings.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("output", type=Path, help="folder for what the tool writes")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; the library's own choice if absent")
    return parser


def read_gptq_arguments(description: str, *, default_batch_size: int | None) -> argparse.Namespace:
    """Parse what the GPTQ scripts take: bits, group size and their common options."""
    parser = make_parser(description, bits=int, group_size=int)
    parser.add_argument("--batch-size", type=int, default=default_batch_size, help="calibration sequences at a time")
    parser.add_argument("--dtype", default="auto", help="auto (as the model is stored), float32, bfloat16, float16")
    parser.add_argument(
        "--clip-search",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="choose scales by squared error instead of by the largest weight; each tool's own default if absent",
    )
    parser.add_argument("--activation-order", action="store_true", help="cptquant only; the peers keep their defaults")
    parser.add_argument("--descent-rounds", type=int, default=None, help="cptquant only; its default if absent")
    return parser.parse_args()
