"""Shapes of attention for tests, benchmarks and ``dualparal calibrate``."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    q_rows: int
    k_rows: int
    heads: int
    head_dim: int
    padding: int = 0  # elements between the rows of k and v

    @property
    def elements(self) -> int:  # of the logits
        return self.q_rows * self.k_rows * self.heads

    @property
    def flops(self) -> int:  # of the two products
        return 4 * self.elements * self.head_dim


_HEADS = {"wan1.3b": 12, "wan14b": 40}
_TOKENS = {"480p": 1560, "720p": 3600}  # per latent frame

# Blocks of 8 frames with 4 or 8 frames of context on either side, and the text.
WAN = [
    *(
        Case(f"{model}-{size}-c{context}", 8 * tokens, (8 + 2 * context) * tokens, heads, 128)
        for model, heads in _HEADS.items()
        for size, tokens in _TOKENS.items()
        for context in (4, 8)
    ),
    *(
        Case(f"{model}-{size}-text", 8 * tokens, 512, heads, 128)
        for model, heads in _HEADS.items()
        for size, tokens in _TOKENS.items()
    ),
]

CASES = [
    *WAN,
    Case("small-heads", q_rows=77, k_rows=130, heads=2, head_dim=24),
    Case("strided", q_rows=64, k_rows=96, heads=3, head_dim=64, padding=64),
    Case("one-key", q_rows=5, k_rows=1, heads=2, head_dim=64),
    Case("empty", q_rows=0, k_rows=96, heads=2, head_dim=64),
]


def ragged(head_dim: int) -> list[Case]:
    """Around the sizes of tiles and of what a warpgroup takes: for a kernel that nobody has seen run."""
    sizes = ((1, 1), (63, 129), (64, 128), (65, 127), (127, 1), (128, 64), (129, 640), (200, 1560))
    return [Case(f"ragged-{q_rows}-{k_rows}", q_rows, k_rows, 3, head_dim, padding=64) for q_rows, k_rows in sizes]


class SegmentsCase(NamedTuple):
    """Keys in several places; ``padding`` is the number of elements between their rows."""

    name: str
    q_rows: int
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    padding: int = 0


SEGMENTS = [
    SegmentsCase("first-block", 96, (96, 48), heads=2, head_dim=64),
    SegmentsCase("own-next-previous", 64, (64, 32, 32), heads=1, head_dim=128),
    SegmentsCase("ragged", 77, (77, 19, 33), heads=2, head_dim=64),
    SegmentsCase("one-empty", 40, (70, 0, 35), heads=1, head_dim=128),
    SegmentsCase("two-empty", 33, (0, 65, 0), heads=2, head_dim=64),
    SegmentsCase("one-segment", 50, (100,), heads=1, head_dim=64),
    SegmentsCase("strided", 70, (64, 20, 44), heads=2, head_dim=64, padding=24),
    SegmentsCase("one-key", 3, (0, 0, 1), heads=1, head_dim=64),
    SegmentsCase("more-keys-than-queries", 17, (200, 60, 40), heads=1, head_dim=64),
]
