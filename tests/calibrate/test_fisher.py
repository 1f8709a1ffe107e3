"""The gradient behind the Fisher metric: labels sampled from the model itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from clla.calibrate import fisher
from clla.calibrate.fisher import BLOCK, sampled_label_gradient
from clla.errors import CllaError

ROWS = 256


def logits_of(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(logits: Tensor, seed: int = 0) -> Tensor:
    return sampled_label_gradient(logits, torch.Generator().manual_seed(seed))


def labels_in(grad: Tensor, logits: Tensor) -> Tensor:
    """The label of each row: where softmax minus gradient is one."""
    one_hot = logits.softmax(-1) - grad
    labels = one_hot.argmax(-1)
    torch.testing.assert_close(one_hot, functional.one_hot(labels, logits.shape[-1]).float(), rtol=0, atol=1e-5)
    return labels


@pytest.mark.parametrize("shape", [(1, 5, 11), (3, 200, 7), (2, ROWS, 5), (1, 1, 2)], ids=str)
def test_it_is_the_gradient_of_the_summed_loss_of_its_labels(shape: tuple[int, int, int]) -> None:
    logits = logits_of(*shape)
    grad = gradient(logits)
    leaf = logits.clone().requires_grad_()
    loss = functional.cross_entropy(leaf.flatten(0, 1), labels_in(grad, logits).flatten(), reduction="sum")
    torch.testing.assert_close(grad, torch.autograd.grad(loss, leaf)[0], rtol=1e-5, atol=1e-6)


def test_labels_follow_the_models_own_distribution() -> None:
    """E[g gᵀ] = diag(p) - p pᵀ, the Fisher matrix of a softmax, and E[g] = 0."""
    row = torch.tensor([1.0, 0.0, -1.0, 2.0, -40.0])
    logits = row.expand(1, 40_000, 5).contiguous()
    g = gradient(logits)[0].double()
    p = row.double().softmax(-1)
    torch.testing.assert_close(g.mT @ g / len(g), torch.diag(p) - torch.outer(p, p), rtol=0, atol=0.01)
    torch.testing.assert_close(g.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=0.01)


def test_every_row_has_its_own_distribution() -> None:
    """A row that is certain draws its certain label, whatever its neighbours are."""
    certain = torch.arange(2 * ROWS) % 9
    logits = 60.0 * functional.one_hot(certain, 9).float()
    logits[::2] = 0
    grad = gradient(logits[None])
    assert torch.equal(labels_in(grad, logits[None])[0, 1::2], certain[1::2])
    assert len(labels_in(grad, logits[None])[0, ::2].unique()) == 9


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_labels_are_those_of_the_inverse_cumulative_distribution(size: int) -> None:
    """The oracle: the first token whose cumulative probability, in fp64, exceeds the row's uniform number."""
    logits = logits_of(1, 2000, size)
    uniform = torch.rand(2000, 1, generator=torch.Generator().manual_seed(5))
    cumulative = logits[0].double().softmax(-1).cumsum(-1)
    expected = (cumulative <= uniform.double()).sum(-1).clamp(max=size - 1)
    near = (cumulative - uniform.double()).abs().amin(-1) < 1e-5  # rounding may decide these
    labels = labels_in(gradient(logits, seed=5), logits)[0]
    assert torch.equal(labels[~near], expected[~near])
    assert int(near.sum()) < 200 or size == 1


def test_how_many_rows_come_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(3, 50, 2 * BLOCK + 3)
    expected = gradient(logits)
    monkeypatch.setitem(fisher.CHUNK_BYTES, "cpu", 4 * 7 * (2 * BLOCK + 3))  # 7 rows
    torch.testing.assert_close(gradient(logits), expected)


def test_an_earlier_result_is_written_over() -> None:
    logits = logits_of(2, 40, 13)
    expected = gradient(logits)
    for earlier in (torch.full_like(logits, torch.nan), torch.ones(2, 41, 13), torch.ones(2, 40, 13).half()):
        out = sampled_label_gradient(logits, torch.Generator().manual_seed(0), out=earlier)
        assert torch.equal(out, expected)
        assert (out is earlier) == (earlier.shape == logits.shape and earlier.dtype == logits.dtype)


def test_masked_tokens_are_never_drawn() -> None:
    logits = logits_of(2, 300, 6)
    logits[..., 1] = float("-inf")
    logits[..., 5] = float("-inf")
    grad = gradient(logits)
    assert bool(grad.isfinite().all())
    assert bool((grad[..., [1, 5]] == 0).all())


def test_the_seed_decides_the_draw() -> None:
    logits = logits_of(2, 50, 13)
    assert torch.equal(gradient(logits, seed=3), gradient(logits, seed=3))
    assert not torch.equal(gradient(logits, seed=3), gradient(logits, seed=4))


def test_successive_calls_draw_anew() -> None:
    logits, generator = logits_of(1, 50, 13), torch.Generator().manual_seed(0)
    first, second = sampled_label_gradient(logits, generator), sampled_label_gradient(logits, generator)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_logits_are_computed_in_full(dtype: torch.dtype) -> None:
    logits = logits_of(1, 40, 17).to(dtype)
    grad = gradient(logits)
    assert grad.dtype == dtype
    assert torch.equal(grad, gradient(logits.float()).to(dtype))


def test_layout_of_the_logits_does_not_matter() -> None:
    """Some models compute sequence first and hand out a transposed view."""
    logits = logits_of(6, 4, 9).transpose(0, 1)  # [4, 6, 9], not contiguous
    torch.testing.assert_close(gradient(logits), gradient(logits.contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    logits = torch.zeros(1, 3, 200)
    logits[0, 1, 150] = value
    with pytest.raises(CllaError, match="NaN or infinite"):
        sampled_label_gradient(logits, torch.Generator())


def test_no_graph_is_kept() -> None:
    assert not gradient(logits_of(1, 3, 4).requires_grad_()).requires_grad
