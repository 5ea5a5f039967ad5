"""HQQ on all linear layers of the blocks; run with the interpreter it is installed in. It needs no calibration.

    <peer python> benchmarks/peers/hqq_uniform.py MODEL TOKENS BITS GROUP_SIZE OUTPUT [--axis 0]

TOKENS is not read. Axis 0 is what its documentation names for quality (its fast kernels want axis 1). A group takes a
scale and a zero point of 16 bits. Codes count with their own width: at 3 bits HQQ packs ten codes into 32 bits, which
would be 3.2. OUTPUT receives the weights as HQQ dequantizes them.
"""

from accounting import Account
from arguments import make_parser
from dense_output import save_dense

SCALE_BITS = 16


def main() -> None:
    parser = make_parser(__doc__, bits=int, group_size=int)
    parser.add_argument("--axis", type=int, default=0, choices=(0, 1))
    args = parser.parse_args()
    account = Account()
    with account.step("import"):
        import torch
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        from transformers import AutoModelForCausalLM
    if args.threads:
        torch.set_num_threads(args.threads)
    with account.step("load"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    weights: dict[str, torch.Tensor] = {}
    bits: dict[str, int] = {}
    with account.step("quantize"):
        config = BaseQuantizeConfig(nbits=args.bits, group_size=args.group_size, axis=args.axis)
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            layer = HQQLinear(
                module, quant_config=config, compute_dtype=torch.float16, device="cpu", del_orig=False
            )  # fmt: skip
            weights[f"{name}.weight"] = layer.dequantize()
            meta = layer.meta
            bits[f"{name}.weight"] = args.bits * module.weight.numel() + SCALE_BITS * (
                meta["scale"].numel() + meta["zero"].numel()
            )
    with account.step("save"):
        save_dense(args.output, weights, bits)
    account.figures["recipe"] = {"axis": args.axis, "optimize": True}
    account.finish("hqq", "transformers", "torch")


if __name__ == "__main__":
    main()
