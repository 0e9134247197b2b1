"""Scratch memory: made once for the most that is asked for."""

import torch

from attnres_ext.scratch import Scratch
from tests.helpers import allocated


def test_memory_is_used_again():
    scratch = Scratch(torch.device("cpu"))
    large = scratch.tensor("a", (3, 4), torch.float32)
    assert scratch.tensor("a", (3, 4), torch.float32) is large
    small = scratch.tensor("a", (5,), torch.float32)
    assert small.shape == (5,)
    assert small.is_contiguous()
    assert small.data_ptr() == large.data_ptr()
    assert allocated(lambda: scratch.tensor("a", (2, 6), torch.float32)) == []
    assert scratch.tensor("b", (5,), torch.float32).data_ptr() != large.data_ptr()


def test_more_or_another_dtype_is_new_memory():
    scratch = Scratch(torch.device("cpu"))
    first = scratch.tensor("a", (4,), torch.float32)
    more = scratch.tensor("a", (5,), torch.float32)
    assert more.shape == (5,)
    assert more.data_ptr() != first.data_ptr()
    other = scratch.tensor("a", (2,), torch.float64)
    assert (other.shape, other.dtype) == ((2,), torch.float64)


def test_memory_made_in_inference_mode_may_be_written_outside_of_it():
    scratch = Scratch(torch.device("cpu"))
    with torch.inference_mode():
        tensor = scratch.tensor("a", (2,), torch.float32)
    assert not tensor.is_inference()
    tensor.zero_()
