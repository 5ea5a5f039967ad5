import torch

from cptquant.models.arithmetic import coarse_products, describe_arithmetic, has_fast_bfloat16


def _product_error(wanted: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    with coarse_products(wanted):
        found = left @ right
    return float((found - exact).norm() / exact.norm())


def test_products_are_exact_unless_asked_for_and_exact_again_afterwards() -> None:
    assert _product_error(False) < 1e-6
    coarse = _product_error(True)
    assert _product_error(False) < 1e-6
    # Two factors rounded to 8 bits of mantissa each: 2^-9 sqrt(2 / 3) or so of the product, if the processor does it.
    assert (1e-4 < coarse < 4e-3) if has_fast_bfloat16() else coarse < 1e-6


def test_the_setting_is_restored_after_an_error() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with coarse_products():
            raise KeyError
    except KeyError:
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_description_follows_the_machine() -> None:
    assert describe_arithmetic(False) == "float32"
    assert (describe_arithmetic(True) == "float32") is not has_fast_bfloat16()
