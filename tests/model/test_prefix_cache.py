"""What is kept of conversations: the longest beginning, never of another picture, never more than allowed."""

import numpy as np
import pytest
import torch

from model.decode import Layers, length
from model.prefix_cache import PrefixCache, common, digest


def layers(tokens: int) -> Layers:
    """Two layers of one row, 16 bytes a token each."""
    return [(torch.rand(1, 1, tokens, 2), torch.rand(1, 1, tokens, 2)) for _ in range(2)]


def test_the_longest_beginning_is_found_and_never_all_of_a_prompt() -> None:
    cache = PrefixCache(10_000)
    cache.keep("a", [1, 9, 9, 5], layers(4))
    longer = layers(6)
    cache.keep("a", [1, 9, 9, 6, 7, 8], longer)
    found = cache.longest("a", [1, 9, 9, 6, 7, 4, 4], least=3)
    assert found is not None and length(found) == 5 and torch.equal(found[1][0], longer[1][0][:, :, :5])
    whole = cache.longest("a", [1, 9, 9, 6, 7, 8], least=3)
    assert whole is not None and length(whole) == 5
    assert cache.longest("a", [1, 9, 4, 4], least=3) is None, "less than the picture is of no use"
    assert cache.longest("b", [1, 9, 9, 6], least=3) is None, "another picture"
    assert (cache.count("a", 9), cache.count("b", 9)) == (2, 0)


def test_bytes_are_bounded_the_newest_stays_and_beginnings_go() -> None:
    cache = PrefixCache(700)
    for name in "abc":
        cache.keep(name, [1, 2, 3], layers(10))
    assert len(cache) == 2 and cache.bytes == 640 and cache.longest("a", [1, 2, 3], 1) is None
    assert cache.longest("b", [1, 2, 3], 1) is not None, "used last, so c goes first"
    cache.keep("d", [1], layers(10))
    assert cache.longest("c", [1, 2, 3], 1) is None and cache.longest("b", [1, 2, 3], 1) is not None
    cache.keep("e", [1] * 90, layers(90))
    assert len(cache) == 1, "larger than allowed, and kept alone"
    cache.keep("e", [1] * 91, layers(91))
    assert len(cache) == 1 and cache.count("e", 1) == 91
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)
    none = PrefixCache(0)
    none.keep("a", [1], layers(1))
    assert len(none) == 0


def test_what_is_kept_is_a_copy() -> None:
    cache, given = PrefixCache(1000), layers(3)
    cache.keep("a", [1, 2, 3], given)
    before = given[0][0].clone()
    given[0][0].zero_()
    found = cache.longest("a", [1, 2, 3, 4], 1)
    assert found is not None and torch.equal(found[0][0], before)


@pytest.mark.parametrize(("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1], [2], 0)])
def test_common(a: list[int], b: list[int], n: int) -> None:
    assert common(a, b) == n


def test_a_picture_is_its_shape_and_its_bytes() -> None:
    flat = np.zeros((2, 6, 3), np.uint8)
    assert digest(flat) == digest(flat.copy()) != digest(flat.reshape(6, 2, 3))
