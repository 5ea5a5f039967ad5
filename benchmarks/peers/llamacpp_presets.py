"""llama.cpp's presets with an importance matrix; run with cptquant's interpreter, llama.cpp has its own.

    python benchmarks/peers/llamacpp_presets.py MODEL TOKENS PRESET OUTPUT --peer-python VENV/bin/python

The original is written as GGUF in 16 bits, the importance matrix holds the mean squared inputs of every matrix on
TOKENS, as `llama-imatrix` collects them (llama-cpp-python does not expose that program), and llama.cpp's own
`llama_model_quantize` does the rest. OUTPUT receives the block matrices as the `gguf` package dequantizes them, and the
bits of their tensors in the file.
"""

import sys
from pathlib import Path

from accounting import Account
from arguments import make_parser
from dense_output import save_dense


def main() -> None:
    parser = make_parser(__doc__, preset=str)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="keeps what all presets share")
    args = parser.parse_args()
    account = Account()
    with account.step("import"):
        import torch
        from safetensors.torch import load_file

        from cptquant.exporters.gguf.read_back import GgufWeights, open_gguf
        from cptquant.models.load import load_model
        from cptquant.models.text import TokenSet

        sys.path.append(str(Path(__file__).parent.parent))
        from gguf_source import quantize_preset, write_importance, write_source
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    with account.step("load"):
        model = load_model(args.model)
        input_ids = load_file(args.calibration)["input_ids"]
        tokens = TokenSet.build(
            input_ids, torch.ones_like(input_ids), None, torch.arange(len(input_ids)), "tokens of the benchmark"
        )
    source, importance = args.work / "original.gguf", args.work / "importance.npz"
    with account.shared_step("importance", args.work) as missing:
        if missing:
            write_source(model, source)
            write_importance(model, tokens, source, importance)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.preset}.gguf"
    with account.step("quantize"):
        quantize_preset(args.peer_python, args.preset, source, importance, path)
    read = GgufWeights(path, model)
    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    weights: dict[str, torch.Tensor] = {}
    bits: dict[str, int] = {}
    types: set[str] = set()
    for site in model.layout.block_sites:
        weight, name = read.weight(site.name), read.tensor_of(site)
        assert weight is not None and name is not None
        weights[site.parameter_name] = weight
        stored = tensors[name]  # q, k and v may share one
        bits[site.parameter_name] = 8 * int(stored.n_bytes) * weight.numel() // int(stored.n_elements)
        types.add(stored.tensor_type.name)
    save_dense(args.output, weights, bits)
    account.figures["recipe"] = {"preset": args.preset, "types": sorted(types)}
    account.finish("gguf", "cptquant", "torch")


if __name__ == "__main__":
    main()
