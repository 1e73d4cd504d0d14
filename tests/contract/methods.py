"""Which settings of each registered method the contract tests run.

A new method needs an entry here; `test_registry_coverage.py` says so when it is missing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from foretell.drafters.tables.datastore.writer import StoreWriter


def _store() -> Path:
    """A datastore over the ids 0..3 in which each follows every pair; the name is the same in every
    process, because it becomes part of the tests' names."""
    path = Path(tempfile.gettempdir()) / f"foretell-test-store-{os.getuid()}"
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with part.open("wb") as f:
        writer = StoreWriter(f, 4, {})
        writer.add(np.array([i * i * i // 7 % 4 for i in range(200)]))
        writer.add(np.random.default_rng(0).integers(0, 5, 300))
        writer.finish()
    part.replace(path)
    return path


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
    "token-recycling": ["token-recycling:nodes=12", "token-recycling:nodes=5,k=3,update=path"],
    "suffix": ["suffix", "suffix:tokens=6,branching=3,factor=4,min_prob=0.05"],
    "aggressive": ["aggressive:start=1,window=4"],
    "aded": ["aded", "aded:nodes=5,depth=3,iterations=8"],
    "stand": ["stand", "stand:nodes=4,max_ngram=2,k=3,onehot=true"],
    "lookahead": ["lookahead", "lookahead:window=2,ngram=2,guesses=3,pool=9"],
    "early-exit": [
        "early-exit:layer=1,tokens=3",
        "early-exit:layer=1,tree=dyspec,nodes=6",
        "early-exit:layer=1,tokens=5,threshold=0.4",
    ],
    "self-skip": [
        "self-skip:tokens=3,threshold=0,every=1,span=4",
        "self-skip:skip=0.9,threshold=0.3,tree=k-ary,branching=2,tokens=2",
    ],
    "del": ["del", "del:tokens=3,every=1,exits=2,fade=0.5,head=0"],
    "fallback": [
        "fallback:of=prompt-lookup(min_ngram=1,tokens=2)+draft-model(tokens=3)",
        "fallback:of=suffix+none,least=2",
    ],
    "merge": [
        "merge:of=prompt-lookup(min_ngram=1)+suffix(branching=3)+token-recycling(nodes=4)",
        "merge:of=draft-model(tokens=2,branching=2)+prompt-lookup(min_ngram=1),nodes=9",
        "merge:of=draft-model(tokens=2)+draft-model(tokens=2,branching=2),nodes=12",
    ],
    "blend": [
        "blend:of=suffix+token-recycling(nodes=12),floor=0.02",
        "blend:of=suffix(branching=2),floor=0.1",
        "blend:of=prompt-lookup(min_ngram=1)+suffix(branching=3)+token-recycling(nodes=4),nodes=5,floor=0",
    ],
    "bandit": [
        "bandit:of=suffix+token-recycling(nodes=9)+prompt-lookup(min_ngram=1)",
        "bandit:of=draft-model(tokens=2)+suffix+none,rule=exp3",
    ],
    "choice": [
        "choice:of=draft-model(tokens=3)+prompt-lookup(min_ngram=1)",
        "choice:of=prompt-lookup(min_ngram=1)+draft-model(tokens=2,branching=2)+suffix",
    ],
    "rasd": [
        "rasd:nodes=12",
        f"rasd:of=draft-model(tokens=2)+retrieval(path={_store()},min_match=1),keep=4",
    ],
    "graft": [
        "graft:nodes=12,prune=0.2",
        "graft:of=draft-model(tokens=2,branching=2)+suffix(min_prob=0.05),nodes=8",
        f"graft:of=draft-model(tokens=2)+retrieval(path={_store()},min_match=1),nodes=9",
    ],
    "retrieval": [f"retrieval:path={_store()},min_match=1,nodes=9"],
}
VERIFIERS = {
    "greedy": ["greedy"],
    "replay": ["replay"],
    "rejection": ["rejection"],
    "specinfer": ["specinfer"],
    "spectr": ["spectr"],
    "greedy-draft": ["greedy-draft"],
    "block": ["block"],
    "multipath": ["multipath"],
    "typical": ["typical", "typical:nucleus=0.9"],
    "reflective": ["reflective", "reflective:weight=0"],
    "judge": ["judge"],
    "lexical-units": ["lexical-units", "lexical-units:threshold=0.3"],
}
LOSSLESS = ["rejection", "specinfer", "spectr", "greedy-draft", "block", "multipath"]
POLICIES = {
    "fixed": ["fixed", "fixed:tokens=2", "fixed:nodes=3"],
    "confidence": ["confidence:threshold=0.5", "confidence:threshold=0.2,tokens=3,refit=false"],
    "entropy": ["entropy:gamma=0.5,adapt=true", "entropy:threshold=0.6"],
    "adaptive": ["adaptive:start=2"],
    "specdec++": ["specdec++", "specdec++:threshold=0.2,tokens=3"],
    "goodput": ["goodput:target=10/11/12/16,draft=1,every=2"],
    "pearl": ["pearl:tokens=3", "pearl:most=4"],
}
MODES = {"superposed": ["superposed"]}  # tests/unit/test_lossy_modes.py
TREES = {  # trees are drafted by draft-model
    "chain": ["tree=chain,depth=2"],
    "k-ary": ["tree=k-ary,branching=2,tokens=2"],
    "static": ["tree=static,paths=0/1/0.0/0.1/1.0/2/0.0.0"],
    "sequoia": ["tree=sequoia,nodes=6,every=4"],
    "optimal": ["tree=optimal,nodes=6,target=10/10/10/12,draft=0.5,every=4"],
    "dyspec": ["tree=dyspec,nodes=6", "tree=dyspec,nodes=6,form=threshold,depth=3"],
    "eagle2": ["tree=eagle2,nodes=6,width=2,depth=3"],
    "rsd-c": ["tree=rsd-c,widths=2/2/1"],
    "rsd-s": ["tree=rsd-s,width=2,depth=3"],
    "specinfer": ["tree=specinfer,widths=1/3/1"],
}
DRAFTERS["draft-model"] += [f"draft-model:{spec}" for specs in TREES.values() for spec in specs]

ALL_DRAFTERS = [spec for specs in DRAFTERS.values() for spec in specs]
SPECULATIVE = [spec for spec in ALL_DRAFTERS if spec != "none"]
ALL_POLICIES = [spec for specs in POLICIES.values() for spec in specs]
FOR_ANY_DRAFTER = [spec for spec in ALL_POLICIES if not spec.startswith("pearl")]
