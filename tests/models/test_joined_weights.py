"""Joined projections give the same results, and stay what they were."""

import pytest
import torch
from torch import nn

from models.glm_image.joined_weights import join_projections


@pytest.mark.parametrize("made_for_inference", [False, True])
@pytest.mark.parametrize("joined_in_inference", [False, True])
def test_weights_are_inference_tensors_only_if_they_were(made_for_inference: bool, joined_in_inference: bool) -> None:
    """A model is joined in whichever mode its engine starts, and loaded or run in the other."""
    with torch.inference_mode(made_for_inference):
        parts = [nn.Linear(3, size) for size in (4, 2, 2)]
    with torch.inference_mode():
        expected = torch.cat([part(torch.ones(1, 3)) for part in parts], dim=1)
    with torch.inference_mode(joined_in_inference):
        weight, bias = join_projections(*parts)
    assert {weight.is_inference(), *(p.is_inference() for part in parts for p in part.parameters())} == {
        made_for_inference
    }
    with torch.inference_mode():
        torch.testing.assert_close(nn.functional.linear(torch.ones(1, 3), weight, bias), expected)
        torch.testing.assert_close(torch.cat([part(torch.ones(1, 3)) for part in parts], dim=1), expected)
    parts[0].weight.data[:] = 0
    assert not weight[:4].any(), "the parts are views"
