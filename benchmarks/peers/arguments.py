"""The command line every contestant's script shares."""

import argparse
from pathlib import Path


def read_arguments(description: str, *, default_batch_size: int | None) -> argparse.Namespace:
    """Parse model, tokens, bits, group size, output and the common options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("tokens", type=Path, help="safetensors file with `input_ids` (n, T) int64")
    parser.add_argument("bits", type=int)
    parser.add_argument("group_size", type=int)
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--batch-size", type=int, default=default_batch_size, help="calibration sequences at a time")
    parser.add_argument("--dtype", default="auto", help="auto (as the model is stored), float32, bfloat16, float16")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; the library's own choice if absent")
    parser.add_argument(
        "--clip-search",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="choose scales by squared error instead of by the largest weight; each tool's own default if absent",
    )
    parser.add_argument("--activation-order", action="store_true", help="cptquant only; the peers keep their defaults")
    parser.add_argument("--descent-rounds", type=int, default=None, help="cptquant only; its default if absent")
    return parser.parse_args()
