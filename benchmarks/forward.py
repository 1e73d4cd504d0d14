"""Milliseconds of one forward over T rows behind a context: foretell's runner and transformers.

The two alternate, so that a noisy machine is noisy for both; compare only inside one run.

    python benchmarks/forward.py --shape small --dtype float32 --rows 1,2,4,8,16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from foretell.core.batch import PackedBatch, Segment, segment_of
from foretell.core.tree import TokenTree
from foretell.models.native.arch import Arch
from foretell.models.native.runner import NativeModel

SHAPES = {
    "draft": Arch.llama(4096, 128, 2, 4, 2, 320),
    "small": Arch.llama(4096, 256, 10, 8, 4, 640),
    "336m": Arch.llama(32000, 1024, 24, 16, 4, 2816, tied=False),
    "1b": Arch.llama(128256, 2048, 16, 32, 8, 8192),
}


def ours(arch: Arch, dtype: torch.dtype, device: str, context: int, tree: bool) -> Callable:
    """run(T) -> seconds of one forward over T rows, rolled back."""
    model = NativeModel.random(arch, dtype, device=device)
    cache = model.new_cache(context + 64)
    with model.open([cache]) as txn:
        ids = np.arange(context) % arch.vocab
        model.forward(PackedBatch([Segment(ids, np.arange(context), None, np.array([0]))]), txn)
        txn.commit([range(context)])

    def run(rows: int) -> float:
        parents = [(i - 1) // 2 for i in range(rows - 1)] if tree else list(range(-1, rows - 2))
        if tree:
            parents = [-1 if i < 2 else (i - 2) // 2 for i in range(rows - 1)]
        segment = segment_of(TokenTree.build([5], [7] * (rows - 1), parents), context, None)
        batch = PackedBatch([segment])
        sync(device)
        start = time.perf_counter()
        with model.open([cache]) as txn:
            model.forward(batch, txn)
        sync(device)
        return time.perf_counter() - start

    return run


def theirs(arch: Arch, dtype: torch.dtype, device: str, context: int) -> Callable:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=arch.vocab,
        hidden_size=arch.hidden,
        num_hidden_layers=len(arch.layers),
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        intermediate_size=arch.ffn,
        tie_word_embeddings=arch.tied,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.03, 0.03)
    # Its frequencies are no parameters: what `to_empty` left there is made anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        model(torch.arange(context, device=device)[None] % arch.vocab, past_key_values=cache)

    @torch.inference_mode()
    def run(rows: int) -> float:
        ids = torch.full((1, rows), 7, device=device)
        sync(device)
        start = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-rows)
        sync(device)
        return time.perf_counter() - start

    return run


def sync(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--rows", default="1,2,4,8,16")
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--repeat", type=int, default=50)
    p.add_argument("--tree", action="store_true", help="binary trees instead of chains")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--alone", action="store_true", help="without transformers")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    arch, dtype = SHAPES[o.shape], getattr(torch, o.dtype)
    runs = {"foretell": ours(arch, dtype, o.device, o.context, o.tree)}
    if not o.alone:
        runs["transformers"] = theirs(arch, dtype, o.device, o.context)
    print(f"{o.shape} {o.dtype} {o.device}, context {o.context}: ms, median (least)")
    print("rows".rjust(5), *(name.rjust(20) for name in runs), "ratio".rjust(8))
    for rows in map(int, o.rows.split(",")):
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(o.repeat + 3):
            for name, run in runs.items():
                t = run(rows)
                if i >= 3:
                    times[name].append(t * 1e3)
        cells = [f"{statistics.median(t):.3f} ({min(t):.3f})".rjust(20) for t in times.values()]
        middle = [statistics.median(t) for t in times.values()]
        print(f"{rows:5}", *cells, f"{middle[-1] / middle[0]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
