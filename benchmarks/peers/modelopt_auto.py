"""NVIDIA ModelOpt's auto_quantize on the linear layers of the blocks; run with the interpreter it is installed in.

    <peer python> benchmarks/peers/modelopt_auto.py MODEL TOKENS AVERAGE_BITS OUTPUT

Its documented search: gradient scores, linear programming, q, k, v and gate, up tied; calibration and scores are kept
by its own `checkpoint` and solved again for each average. Its ready-made weight-only formats begin at 4 bits, so the
options here are its custom formats (an experimental feature, it says): integers of 2, 3, 4 and 8 bits in symmetric
groups of 64, each calibrated by AWQ lite as its INT4_AWQ_CFG is. `effective_bits` is told to count scales and to leave
the head out. Nothing is exported: version 0.47 refuses to ("Unsupported quantizer with num_bits: 2"). OUTPUT receives
the fake-quantized weights with AWQ's input scales folded in (an engine would put them into the layer before; no cost).
"""

from pathlib import Path
from typing import Any

from accounting import Account
from arguments import make_parser
from dense_output import save_dense

WIDTHS, GROUP, SCALE_BITS = (2, 3, 4, 8), 64, 16


def main() -> None:
    parser = make_parser(__doc__, average_bits=float)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--algorithm", default="awq_lite")
    parser.add_argument("--work", type=Path, required=True, help="keeps the search's state, which all averages share")
    args = parser.parse_args()
    account = Account()
    with account.step("import"):
        import modelopt.torch.quantization as mtq
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    if args.threads:
        torch.set_num_threads(args.threads)
    with account.step("load"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        input_ids = load_file(args.calibration)["input_ids"]
    batches = [{"input_ids": rows, "labels": rows} for rows in input_ids.split(args.batch_size)]
    args.work.mkdir(parents=True, exist_ok=True)
    state = args.work / "search.pth"
    with account.shared_step("search", args.work) as missing:
        if missing:
            state.unlink(missing_ok=True)
        model, _ = mtq.auto_quantize(
            model,
            constraints={
                "effective_bits": args.average_bits, "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
            },
            quantization_formats=[weight_only(width, args.algorithm) for width in WIDTHS],
            data_loader=batches, forward_step=lambda model, batch: model(**batch),
            loss_func=lambda output, batch: output.loss, disabled_layers=["*lm_head*"],
            num_calib_steps=len(batches), num_score_steps=len(batches), verbose=True,
            checkpoint=str(state),
        )  # fmt: skip
    with account.step("save"):
        save_dense(args.output, *read_weights(model))
    account.figures["recipe"] = {"widths": WIDTHS, "group": GROUP, "algorithm": args.algorithm, "method": "gradient"}
    account.finish("nvidia-modelopt", "transformers", "torch")


def weight_only(width: int, algorithm: str) -> dict[str, Any]:
    """One custom format, with its scales counted."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "enable": True,
             "cfg": {"num_bits": width, "block_sizes": {-1: GROUP, "type": "static"}}},
            {"quantizer_name": "*input_quantizer", "enable": False},
        ],
        "algorithm": algorithm,
        "effective_bits": width + SCALE_BITS / GROUP,
    }  # fmt: skip


def read_weights(model: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Fake-quantized weights, and the bits that codes and scales would take; layers left alone take 16 a weight."""
    import torch

    weights, bits = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":  # embeddings have quantizers too, unused here
            continue
        quantizer = module.weight_quantizer
        weight, per_weight = module.weight.detach(), 16.0
        if quantizer.is_enabled:
            weight, per_weight = quantizer(weight), quantizer.num_bits + SCALE_BITS / GROUP
            scale = getattr(module.input_quantizer, "pre_quant_scale", None)
            if scale is not None:
                weight = weight * scale[None, :]
        weights[f"{name}.weight"] = weight
        bits[f"{name}.weight"] = int(per_weight * weight.numel())
    return weights, bits


if __name__ == "__main__":
    main()
