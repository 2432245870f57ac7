"""The regularisers' functions of a latent or an image, beside numpy and by hand.

What trains with them, a step and a process at a time, is in test_train_tokenizer.py.
"""

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

import objectives


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_local_correlation_is_the_mean_over_the_pairs_of_numpy():
    """2 x 3 windows in 4 x 7 positions; the last column is left out."""
    mean, found = randn(2, 5, 4, 7), []
    for image in mean.double().numpy():
        for i in (0, 2):
            for j in (0, 2, 4):
                pairs = np.corrcoef(image[:, i:i + 2, j:j + 2].reshape(5, 4).T)
                found += pairs[np.triu_indices(4, 1)].tolist()
    assert len(found) == 2 * 6 * 6
    assert_close(objectives.local_correlation(mean), torch.tensor(found).mean())


def test_local_correlation_from_alike_to_as_unlike_as_four_can_be():
    """A scale and an offset of a position change nothing: 1.  Two opposite pairs have
    correlations 1, 1, -1, -1, -1, -1: -1/3."""
    a = randn(1, 6, 1, 1)
    factors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert_close(objectives.local_correlation(factors * a + factors), torch.tensor(1.0))
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert_close(objectives.local_correlation(signs * a), torch.tensor(-1 / 3))


def test_the_gradient_of_local_correlation_by_finite_differences():
    mean = randn(1, 3, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(objectives.local_correlation, mean)


def test_an_image_and_its_pixels_move_alike():
    """A quarter to the left takes the first column to the last row, from below."""
    a = torch.arange(4.0).view(1, 1, 2, 2)   # 0 1 / 2 3
    assert objectives.moved(a, 2, 0).flatten().tolist() == [0, 1, 2, 3]
    assert objectives.moved(a, 2, 1).flatten().tolist() == [1, 3, 0, 2]
    assert objectives.moved(a, 1, 3).tolist() == [[[[1.5]]]]
    # A ramp stays a ramp, and four quarters are none.
    ramp = (torch.arange(8.0) + 0.5).expand(1, 1, 8, 8)
    assert objectives.moved(ramp, 4, 0)[0, 0, 0].tolist() == [1, 3, 5, 7]
    z = randn(2, 3, 4, 4)
    assert torch.equal(objectives.moved(objectives.moved(z, 4, 1), 4, 3), z)
    # Moving commutes with every map of single positions.
    weight = randn(5, 3, 1, 1, seed=1)
    apart = [torch.conv2d(objectives.moved(z, 3, 2), weight),
             objectives.moved(torch.conv2d(z, weight), 3, 2)]
    assert_close(*apart)


def test_hidden_positions_are_the_token_and_give_it_their_gradient():
    """Two of four positions in three images: the token gets six times the gradient 1."""
    z, token = randn(3, 2, 2, 2).requires_grad_(), randn(2, seed=1).requires_grad_()
    hidden = torch.tensor([[True, False], [False, True]])
    found = objectives.hide_positions(z, token, hidden)
    assert torch.equal(found[:, :, 0, 0], token.expand(3, 2))
    assert torch.equal(found[:, :, 0, 1], z[:, :, 0, 1])
    found.sum().backward()
    assert token.grad.tolist() == [6, 6]
    assert torch.equal(z.grad[2, 1], 1 - hidden.float())


def test_hidden_patches_are_grey():
    x = 1 + torch.rand(2, 3, 4, 6)
    hidden = torch.tensor([[[True, False, False], [False] * 3], [[False] * 3, [False, True, True]]])
    found = objectives.hide_patches(x, hidden)
    x[0, :, :2, :2] = 0
    x[1, :, 2:, 2:] = 0
    assert torch.equal(found, x)
