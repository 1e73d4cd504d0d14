"""A real checkpoint scores what its author's own program scores."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from foretell.core.batch import PackedBatch, Segment
from foretell.models.load import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from stories import convert

NATS = 1.273  # per token, first 900 characters of the first 20 stories


def test_stories260k_nats_per_token(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    convert(folder / "stories260K.bin", folder / "tok512.bin", tmp_path)
    model = load_model(tmp_path, device="cpu")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = (folder / "tiny.utf8").read_text(encoding="utf-8")
    stories = [s.strip() for s in text.split("<|endoftext|>") if s.strip()][:20]
    total, count = 0.0, 0
    for story in stories:
        encoded = tokenizer.encode(" " + story[:900], add_special_tokens=False)
        ids = [1, *encoded.ids][: model.spec.max_positions]
        batch = PackedBatch([Segment(np.asarray(ids[:-1], np.int64), np.arange(len(ids) - 1))])
        with model.open([model.new_cache()]) as txn:
            logits = model.forward(batch, txn).logits
        total += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    assert len(stories) == 20
    assert total / count == pytest.approx(NATS, abs=0.01)
