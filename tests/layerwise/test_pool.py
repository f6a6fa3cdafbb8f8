"""The pool keeps copies, and uses memory again."""

from __future__ import annotations

import torch

from fxcompress.layerwise.pool import Pool


def test_copies_are_kept_apart_and_memory_is_used_again() -> None:
    pool = Pool()
    values = [torch.randn(3, 5), torch.randn(3, 5), torch.randint(0, 9, (7,)), torch.zeros(0, 4), torch.randn(5, 3).t()]
    kept = [pool.keep(v) for v in values]
    for value, copy in zip(values, kept, strict=True):
        assert torch.equal(value, copy) and copy.dtype == value.dtype and copy.is_contiguous()
        assert copy.data_ptr() % 64 == kept[0].data_ptr() % 64
    place = kept[1].data_ptr()
    pool.release(kept[1])
    pool.release(values[0])  # not the pool's: nothing happens
    again = pool.keep(torch.ones(3, 5))
    assert again.data_ptr() == place and torch.equal(kept[0], values[0])
