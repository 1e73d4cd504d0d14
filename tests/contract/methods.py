"""Which settings of each registered method the contract tests run.

A new method needs an entry here; `test_registry_coverage.py` says so when it is missing.
"""

from __future__ import annotations

DRAFTERS = {
    "none": ["none"],
    "prompt-lookup": [
        "prompt-lookup:min_ngram=1",
        "prompt-lookup:tokens=3,max_ngram=2,min_ngram=1,span=prompt",
    ],
    "draft-model": [
        "draft-model:tokens=1",
        "draft-model:tokens=4",
        "draft-model:tokens=2,branching=2",
        "draft-model:tokens=4,branching=3",
    ],
}
VERIFIERS = {"greedy": ["greedy"], "replay": ["replay"], "rejection": ["rejection"]}
POLICIES = {
    "fixed": ["fixed", "fixed:tokens=2", "fixed:nodes=3"],
    "confidence": ["confidence:threshold=0.5", "confidence:threshold=0.2,tokens=3"],
}

ALL_DRAFTERS = [spec for specs in DRAFTERS.values() for spec in specs]
SPECULATIVE = [spec for spec in ALL_DRAFTERS if spec != "none"]
ALL_POLICIES = [spec for specs in POLICIES.values() for spec in specs]
