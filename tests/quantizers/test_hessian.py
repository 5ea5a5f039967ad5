"""Second moments of inputs: exact, padding left out, shared where modules really read the same tensor."""

import pytest
import torch
from torch import Tensor, nn

from cptquant.core.errors import CptquantError
from cptquant.quantizers.hessian import Complete, HessianAccumulator, InputHessians


def test_streamed_mean_of_outer_products_without_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    accumulator, kept = HessianAccumulator(13), []
    for size in (3, 5, 2):
        inputs = torch.randn(size, 7, 13, generator=generator)
        mask = torch.rand(size, 7, generator=generator).lt(0.7).long()
        accumulator.add(inputs, mask)
        kept.append(inputs[mask.bool()])
    rows = torch.cat(kept).double()
    assert accumulator.count == len(rows)
    hessian = accumulator.hessian()
    torch.testing.assert_close(hessian.double(), rows.t() @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert torch.equal(hessian, hessian.t())


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 9])
def test_narrow_inputs(width: int) -> None:
    accumulator = HessianAccumulator(width)
    inputs = torch.arange(6.0 * width).reshape(6, width)
    accumulator.add(inputs)
    assert torch.allclose(accumulator.hessian(), inputs.t() @ inputs / 6)


def test_an_empty_hessian_is_undefined() -> None:
    accumulator = HessianAccumulator(4)
    accumulator.add(torch.ones(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="no input vector was added"):
        accumulator.hessian()


class Attention(nn.Module):
    """q and k read the same tensor, v a copy, o something else; `odd` is never called."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.odd = (nn.Linear(6, 6, bias=False) for _ in range(5))
        self.in_place = in_place

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden * 1
        q = self.q(hidden)
        if self.in_place:
            hidden += 1
        return self.o(q + self.k(hidden) + self.v(hidden.clone()))


def collect(model: Attention, batches: list[Tensor]) -> InputHessians:
    modules = {name: child for name, child in model.named_children()}
    with torch.no_grad(), InputHessians(modules) as hessians:
        for batch in batches:
            hessians.start_batch(torch.ones(batch.shape[:2]))
            model(batch)
    model(batches[0])  # the hooks are gone: this must not count
    return hessians


def test_sharing_is_seen() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 4, 6), torch.randn(3, 4, 6)]
    hessians = collect(Attention(), batches)
    assert hessians.leader == {"q": "q", "k": "q", "v": "v", "o": "o"}
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches])
    for site in ("q", "k", "v"):
        assert torch.allclose(hessians.hessian(site), rows.t() @ rows / 20, atol=1e-5)
    assert not torch.allclose(hessians.hessian("o"), hessians.hessian("q"))
    assert hessians.has("k") and not hessians.has("odd")


def test_a_tensor_changed_in_place_is_another_input() -> None:
    torch.manual_seed(0)
    batch = torch.randn(2, 4, 6)
    hessians = collect(Attention(in_place=True), [batch])
    assert hessians.leader["k"] == "k"
    rows = batch.reshape(-1, 6) + 1
    assert torch.allclose(hessians.hessian("k"), rows.t() @ rows / 8, atol=1e-5)


def test_sharing_that_comes_and_goes_is_an_error() -> None:
    model = Attention()
    with torch.no_grad(), InputHessians(dict(model.named_children())) as hessians:
        hessians.start_batch(torch.ones(1, 4))
        model(torch.randn(1, 4, 6))
        model.in_place = True
        hessians.start_batch(torch.ones(1, 4))
        with pytest.raises(CptquantError, match="k shared its input with q on one batch"):
            model(torch.randn(1, 4, 6))


def test_vectors_that_are_no_tokens_are_not_masked() -> None:
    pooler = nn.Linear(6, 6)
    with torch.no_grad(), InputHessians({"pooler": pooler}) as hessians:
        mask = torch.ones(2, 4)
        mask[:, 2:] = 0
        hessians.start_batch(mask)
        pooled = torch.randn(2, 6)
        pooler(pooled)
    assert torch.allclose(hessians.hessian("pooler"), pooled.t() @ pooled / 2, atol=1e-6)


def test_a_pass_ends_once_everything_was_seen() -> None:
    model, reached = Attention(), []
    model.o.register_forward_hook(lambda *_: reached.append("o"))
    modules = {name: getattr(model, name) for name in ("v", "q", "o")}
    with torch.no_grad(), InputHessians(modules, stops_early=True) as hessians:
        for _ in range(2):
            hessians.start_batch(torch.ones(1, 4))
            with pytest.raises(Complete):
                model(torch.randn(1, 4, 6))
    assert not reached and all(hessians.has(site) for site in modules)
    with torch.no_grad(), InputHessians({**modules, "odd": model.odd}, stops_early=True) as hessians:
        hessians.start_batch(torch.ones(1, 4))
        model(torch.randn(1, 4, 6))
    assert reached == ["o"]
