"""AutoRound's best recipe: AutoScheme chooses a width for each layer, SignRound learns the rounding.

    <peer python> benchmarks/peers/autoround_scheme.py MODEL TEXTS.json AVERAGE_BITS OUTPUT [--iterations 200]

TEXTS.json is a list of {"text": ...} of 256 tokens or more each; AutoRound takes no token ids beside AutoScheme. Widths
offered: 2, 3, 4, 8 in groups of 64, symmetric (AutoRound's own presets). AVERAGE_BITS counts scales and zero points as
AutoRound does. Counted as "quantize": everything from the loaded library to the saved checkpoint.
"""

from accounting import Account
from arguments import make_parser

OPTIONS = ["W2A16G64", "W3A16G64", "W4A16G64", "W8A16G64"]


def main() -> None:
    parser = make_parser(__doc__, average_bits=float)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
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
            args.model, tokenizer=AutoTokenizer.from_pretrained(args.model),
            scheme=AutoScheme(avg_bits=args.average_bits, options=OPTIONS), dataset=str(args.calibration),
            iters=args.iterations, seqlen=args.length, nsamples=args.sequences, device_map="cpu",
            enable_torch_compile=False,
        ).quantize_and_save(str(args.output), format="auto_round")  # fmt: skip
    account.figures["recipe"] = {"options": OPTIONS, "iterations": args.iterations}
    account.finish("auto-round", "transformers", "torch")


if __name__ == "__main__":
    main()
