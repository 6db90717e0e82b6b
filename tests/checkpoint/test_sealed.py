"""Files of tensors that a checksum guards: tensors that share their memory are kept, too."""

from __future__ import annotations

from pathlib import Path

import torch

from dualparal.checkpoint import sealed


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    """Embeddings of two videos with one prompt are the same tensor."""
    rows = torch.randn(4, 3)
    tensors = {"first": rows, "second": rows, "part": rows[1:]}
    found, metadata = sealed.read(sealed.write(tmp_path, "some", tensors, {"a": "b"}))
    assert metadata == {"a": "b"} and set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
