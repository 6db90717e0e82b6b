"""A model's tokenizer may not keep a run waiting: it is tried elsewhere, with a limit, when it has patterns."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from dualparal.models import tokenizing
from dualparal.models.json_files import ModelError
from dualparal.models.tokenizing import try_tokenizer


def _save(folder: Path, pattern: str) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    tokenizer.normalizer = normalizers.Replace(Regex(pattern), "b")
    tokenizer.save(str(folder / "tokenizer.json"))


def test_patterns_that_take_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_CPU_SECONDS", 1)
    try_tokenizer(tmp_path, ["a cat"])  # there is none
    _save(tmp_path, " {2,}")  # UMT5's
    try_tokenizer(tmp_path, ["a  cat", "b" * 3000])
    _save(tmp_path, r"a*a*a*a*(?!a)(?<!a)")  # n^5 steps, and the library's own limit lets them pass
    with pytest.raises(ModelError, match=r"tokenizer\.json: its patterns take more than 1 s"):
        try_tokenizer(tmp_path, ["a cat", "a" * 120])
    monkeypatch.setattr(tokenizing, "_MAX_BYTES", 100)
    with pytest.raises(ModelError, match="at most 100"):
        try_tokenizer(tmp_path, ["a cat"])
