"""AutoRound's best recipe: AutoScheme chooses a width for each layer, SignRound learns the rounding.

    <peer python> benchmarks/peers/autoround_scheme.py MODEL TEXTS.json AVERAGE_BITS OUTPUT [--iterations 200]

TEXTS.json is a list of {"text": ...} of 256 tokens or more each; AutoRound takes no token ids beside AutoScheme. Widths
offered: 2, 3, 4, 8 in groups of 64, symmetric (AutoRound's own presets). AVERAGE_BITS counts scales and zero points as
AutoRound does. Counted as "quantize": everything from the loaded library to the saved checkpoint.
"""

import argparse
import importlib.metadata
from pathlib import Path

from accounting import Account

OPTIONS = ["W2A16G64", "W3A16G64", "W4A16G64", "W8A16G64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("average_bits", type=float)
    parser.add_argument("output", type=Path)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    account = Account()
    with account.step("import"):
        import torch
        from auto_round import AutoRound, AutoScheme
        from transformers import AutoTokenizer
    if args.threads:
        torch.set_num_threads(args.threads)
    with account.step("quantize"):
        AutoRound(
            str(args.model), tokenizer=AutoTokenizer.from_pretrained(args.model),
            scheme=AutoScheme(avg_bits=args.average_bits, options=OPTIONS), dataset=str(args.texts),
            iters=args.iterations, seqlen=args.length, nsamples=args.sequences, device_map="cpu",
            enable_torch_compile=False,
        ).quantize_and_save(str(args.output), format="auto_round")  # fmt: skip
    account.figures["recipe"] = {"options": OPTIONS, "iterations": args.iterations}
    account.figures["versions"] = {
        name: importlib.metadata.version(name) for name in ("auto-round", "transformers", "torch")
    }
    account.figures["threads"] = torch.get_num_threads()
    account.print_figures()


if __name__ == "__main__":
    main()
