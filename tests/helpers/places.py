"""The folders of this checkout that tests read from or start programs in."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
WORKERS = TESTS / "workers"
BENCH = ROOT / "bench"
CSRC = ROOT / "csrc"
DOCS = ROOT / "docs"
TOOLS = ROOT / "tools"
