"""llama.cpp as a system of the bench, through llama-cpp-python's bindings of its C interface.

The high-level Python class copies logits of every row into numpy and samples in steps that cost
more than a small model's forward. This adapter calls `llama_decode` itself, so that what is timed
is llama.cpp: plain decoding, prompt lookup (the package's own `LlamaPromptLookupDecoding`), and a
draft model in a second context, drafted greedily and verified in one batch, as llama.cpp's own
simple speculative example does.
"""

from __future__ import annotations

import ctypes
from typing import Any

from foretell.lab.bench.workers.steps import Steps

LOOKUP = 10  # LlamaPromptLookupDecoding's default
DRAFT = 3  # --spec-draft-n-max's default
CHUNK = 512  # llama.cpp's default for n_batch


class Context:
    """A model and the rows of one sequence in it."""

    def __init__(self, path: str, threads: int, rows: int, kind: str) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]
        import numpy as np

        self.api, self.np = llama_cpp, np
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch = rows, CHUNK
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        if kind == "f32":  # the same class for the rows as for the weights; f16 otherwise
            context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        made = llama_cpp.llama_init_from_model(model, context)
        if not made:
            raise RuntimeError(f"llama.cpp cannot make a context for {path}")
        self.model, self.context = model, made
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.memory = llama_cpp.llama_get_memory(made)
        self.n = 0  # rows held

    def keep(self, n: int) -> None:
        """Forget rows n.. ."""
        if n < self.n:
            self.api.llama_memory_seq_rm(self.memory, 0, n, -1)
            self.n = n

    def feed(self, tokens: list[int], wanted: int) -> None:
        """Run `tokens` behind the rows held; logits for the last `wanted` of them."""
        for at in range(0, len(tokens), CHUNK):
            part = tokens[at : at + CHUNK]
            batch = self.batch
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = self.n + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = int(at + i >= len(tokens) - wanted)
            code = self.api.llama_decode(self.context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode failed with {code}")
            self.n += len(part)
            self.last = len(part)

    def logits(self, back: int) -> Any:
        """[V] of the row `back` rows before the last one."""
        found = self.api.llama_get_logits_ith(self.context, self.last - 1 - back)
        pointer = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return self.np.ctypeslib.as_array(pointer, shape=(self.vocab,))


class System:
    """One sequence at a time."""

    def load(self, config: dict[str, Any]) -> dict[str, Any]:
        import llama_cpp  # pyright: ignore[reportMissingImports]
        import numpy as np

        @llama_cpp.llama_log_callback
        def silent(level: int, text: bytes, data: Any) -> None:
            pass

        self.silent = silent  # llama.cpp keeps the pointer
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.config = config
        self.rows = config["rows"]
        self.target = self._context(config["file"])
        self.draft: Context | None = None
        self.rng = np.random.default_rng(config["seed"])
        self.stops = frozenset() if config["ignore_eos"] else frozenset(config["eos"])
        features = llama_cpp.llama_print_system_info()
        return {
            "version": llama_cpp.__version__,
            "features": features.decode(errors="replace").strip(),
            "threads": config["threads"],
            "dtype": config["file_dtype"],
            "same_class": True,
        }

    def _context(self, path: str) -> Context:
        return Context(path, self.config["threads"], self.rows, self.config["file_dtype"])

    def modes(self, wanted: list[str]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for mode in wanted:
            kind = self.config["modes"][mode]["mode"]
            found[mode] = None
            if self.config["batch"] > 1:
                found[mode] = "this adapter decodes one sequence at a time"
            elif kind == "draft" and not self.config["draft_file"]:
                found[mode] = "there is no draft model"
            elif kind == "draft" and self.draft is None:
                self.draft = self._context(self.config["draft_file"])
        return found

    def run(self, mode: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        chosen = self.config["modes"][mode]
        kind, (prompt,) = chosen["mode"], prompts
        size = chosen["tokens"] or (DRAFT if kind == "draft" else LOOKUP)
        target, tokens, drafted = self.target, list(prompt), 0
        lookup = self._lookup(size) if kind == "lookup" else None
        steps = Steps()
        target.keep(0)
        if self.draft is not None:
            self.draft.keep(0)
            self.fed: list[int] = []  # ids whose rows the draft's context holds
            self.sure = 0
        draft: list[int] = []
        done = False
        while not done:
            rows = len(tokens) + len(draft) - target.n
            fed = [*tokens, *draft][-rows:]
            target.feed(fed, 1 + len(draft))
            drafted += len(draft)
            taken: list[int] = []
            for i in range(len(draft) + 1):
                taken.append(self._pick(target.logits(len(draft) - i)))
                over = len(tokens) + len(taken) - len(prompt) >= max_tokens
                done = taken[-1] in self.stops or over
                if done or i == len(draft) or taken[-1] != draft[i]:
                    break
            tokens += taken
            steps.add(len(taken))
            target.keep(len(tokens) - 1)
            room = min(size, max_tokens - (len(tokens) - len(prompt)) - 1)
            if lookup is not None and room > 0 and not done:
                draft = lookup(tokens)[:room]
            elif kind == "draft" and not done:
                draft = self._draft(tokens, room)
        steps.stop()
        return steps.result([tokens[len(prompt) :]], drafted=drafted)

    def _lookup(self, size: int) -> Any:
        import numpy as np
        from llama_cpp import llama_speculative  # pyright: ignore[reportMissingImports]

        find = llama_speculative.LlamaPromptLookupDecoding(num_pred_tokens=size)
        return lambda tokens: find(np.asarray(tokens, np.intc)).tolist()

    def _draft(self, tokens: list[int], size: int) -> list[int]:
        draft = self.draft
        assert draft is not None
        # rows of tokens[:sure] are right; those of the last drafts are where they were accepted
        same = min(draft.n, len(tokens) - 1)
        for i in range(min(self.sure, same), same):
            if self.fed[i] != tokens[i]:
                same = i
                break
        draft.keep(same)
        self.fed = tokens.copy()
        self.sure = len(tokens)
        found: list[int] = []
        ids = tokens[draft.n :]
        while len(found) < size:
            draft.feed(ids, 1)
            found.append(int(draft.logits(0).argmax()))
            ids = found[-1:]
        self.fed += found
        return found

    def _pick(self, logits: Any) -> int:
        temperature = self.config["temperature"]
        if temperature == 0:
            return int(logits.argmax())
        noise = self.rng.gumbel(size=len(logits))
        return int((logits / temperature + noise).argmax())
