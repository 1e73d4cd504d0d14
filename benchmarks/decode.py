"""End-to-end decoding against transformers: same weights, same dtype, same prompts, one run.

Four ways take turns on every prompt: foretell plain, foretell with a drafter, transformers greedy
generate, transformers assisted generation. Times are whole calls (prefill included); the table
quotes medians over prompts and repetitions, and the ratios of paired calls.

    python benchmarks/decode.py                       the bundled pair
    python benchmarks/decode.py --shape 336m          random weights, plain decoding only
    python benchmarks/decode.py --prompts FILE.jsonl  `prompt`, `turns` or `question` per line
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import foretell
from foretell.engine.llm import LLM
from foretell.models.load import bundled_model

PROMPTS = [
    "def fibonacci(n):\n    ",
    "import os\n\ndef list_files(path):\n    ",
    "It was a bright cold morning, and the old house",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
]
SHAPES = {
    "336m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 2816,
        "vocab_size": 32000,
    }
}


def read_prompts(path: str, count: int) -> list[str]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    return [r.get("prompt") or r.get("question") or r["turns"][0] for r in rows[:count]]


def random_checkpoint(shape: str, folder: str, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def ways(args: argparse.Namespace, path: Path) -> dict[str, Callable[[list[int]], list[int]]]:
    """Name -> a function from prompt ids to generated ids."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype)
    peer: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    own = LLM.load(path, draft="none", dtype=args.dtype) if not args.shape else load_ids(path, args)
    greedy = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
    peer.generation_config.eos_token_id = None  # every way decodes the same number of tokens

    def ours(llm: LLM) -> Callable[[list[int]], list[int]]:
        return lambda ids: llm.generate([ids], max_tokens=args.tokens, ignore_eos=True)[0].token_ids

    def theirs(**extra: Any) -> Callable[[list[int]], list[int]]:
        def run(ids: list[int]) -> list[int]:
            out = peer.generate(torch.tensor([ids]), **greedy, **extra)
            return out[0, len(ids) :].tolist()

        return run

    result = {"foretell plain": ours(own), "transformers plain": theirs()}
    if args.shape is None:
        for spec in args.draft:
            result[f"foretell {spec}"] = ours(LLM.load(path, draft=spec, dtype=args.dtype))
        small = AutoModelForCausalLM.from_pretrained(path / "draft", dtype=dtype).eval()
        result["transformers assisted"] = theirs(assistant_model=small)
    return result


def load_ids(path: Path, args: argparse.Namespace) -> LLM:
    """A checkpoint without a tokenizer."""
    from foretell.models.load import load_model

    return LLM(load_model(str(path), dtype=args.dtype), draft="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompts")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument(
        "--draft",
        action="append",
        default=None,
        help="drafters to time (default: draft-model, prompt-lookup)",
    )
    args = parser.parse_args()
    args.draft = args.draft or ["draft-model", "prompt-lookup"]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = bundled_model()
        if args.shape:
            path = Path(folder)
            random_checkpoint(args.shape, folder, getattr(torch, args.dtype))
            prompts = [list(range(5, 69))]
        else:
            tokenizer = foretell.load(draft="none").encode
            texts = read_prompts(args.prompts, args.count) if args.prompts else PROMPTS
            prompts = [tokenizer(t)[:1024] for t in texts]
        runs = ways(args, path)
        times: dict[str, list[float]] = {name: [] for name in runs}
        same = dict.fromkeys(runs, 0)
        for round_ in range(args.repeat + 1):  # the first is a warm-up
            for ids in prompts:
                reference: list[int] = []
                for name, run in runs.items():
                    start = perf_counter()
                    out = run(ids)
                    seconds = perf_counter() - start
                    reference = reference or out
                    if round_:
                        times[name].append(seconds)
                        same[name] += out == reference
    base = times["foretell plain"]
    print(f"{args.dtype}, {args.threads} threads, {args.tokens} tokens, {len(prompts)} prompts")
    print(f"{'way':40s} {'ms/token':>9s} {'speed-up':>9s} {'same ids':>9s}")
    for name, seconds in times.items():
        ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
        each = statistics.median(seconds) / args.tokens * 1e3
        print(f"{name:40s} {each:9.3f} {ratio:9.2f} {same[name]:4d}/{len(seconds)}")


if __name__ == "__main__":
    main()
