"""foretell itself as a system of the bench: all methods share one loaded target."""

from __future__ import annotations

import platform
from typing import Any

from foretell.lab.bench.workers.steps import Steps


class System:
    """Modes are methods: `methods` of the configuration maps a name to draft, verify, policy."""

    def load(self, config: dict[str, Any]) -> dict[str, Any]:
        import torch

        from foretell import __version__
        from foretell.engine.llm import LLM
        from foretell.models.load import find_checkpoint

        self.config = config
        folder = find_checkpoint(config["model"] or None)
        self.llm = LLM.load(
            folder,
            draft="none",
            dtype=config["dtype"],
            device=config["device"],
            threads=config["threads"],
            max_batch=config["batch"],
        )
        if config.get("draft_path"):
            self.llm.context.default_draft = config["draft_path"]
        self.ready: dict[str, LLM] = {}
        model, tokenizer = self.llm.model, self.llm.tokenizer
        self.cuda = model.device.type == "cuda"
        return {
            "version": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(model.device) if self.cuda else "cpu",
            "backend": type(model).__name__,
            "dtype": _dtype(model),
            "name": model.spec.name,
            "folder": str(folder),
            "vocab": model.spec.vocab,
            "max_positions": model.spec.max_positions,
            "chat": bool(tokenizer is not None and tokenizer.has_chat_template),
            "eos": sorted(tokenizer.eos_ids) if tokenizer is not None else [],
            "default_draft": self.llm.context.default_draft,
        }

    def modes(self, wanted: list[str]) -> dict[str, str | None]:
        from foretell.core.errors import ForetellError

        found: dict[str, str | None] = {}
        for mode in wanted:
            try:
                self._method(mode)
                found[mode] = None
            except ForetellError as error:
                found[mode] = str(error)
        return found

    def promise(self, mode: str) -> str:
        return str(self._method(mode).rules.promise(self._params(1)))

    def fresh(self) -> None:
        """New drafters, rules and policies over the same weights: what one of them has learned
        from a prompt must not help it when the prompt comes again."""
        self.ready.clear()

    def run(self, mode: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        llm = self._method(mode)
        llm.engine.scheduler.clear_kept()  # the same prompt again must not find its rows
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        params = self._params(max_tokens)
        steps = Steps(len(prompts))
        if len(prompts) == 1:
            outputs = llm.generate([prompts[0]], params)
            steps.stop()
            stats = outputs[0].stats  # same clock, and no call for each token
            steps.firsts, steps.first_tokens = [stats.first - steps.start], stats.first_step
        else:
            seen: dict[int, int] = {}

            def on_event(event: Any) -> None:
                steps.add(1, seen.setdefault(event.request, len(seen)))

            outputs = llm.generate(prompts, params, on_event=on_event)
            steps.stop()
        every = [o.stats for o in outputs]
        counts = {
            "steps": sum(s.steps for s in every),
            "drafted": sum(s.drafted for s in every),
            "histogram": _sum([s.histogram for s in every]),
            "per_position": _sum([s.per_position for s in every]),
            "reused": sum(s.reused for s in every),
            "promise": outputs[0].promise,
        }
        return steps.result([o.token_ids for o in outputs], **counts)

    def encode(
        self,
        text: str | None = None,
        messages: list[dict[str, str]] | None = None,
        ids: list[int] | None = None,
    ) -> list[int]:
        if messages is not None:
            return self.llm.chat_ids(messages)
        return self.llm.encode(text if ids is None else ids)  # type: ignore[arg-type]

    def decode(self, ids: list[int]) -> str:
        assert self.llm.tokenizer is not None
        return self.llm.tokenizer.decode(ids)

    def round_trip(self, ids: list[int]) -> list[int] | None:
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            return None
        return tokenizer.encode(tokenizer.decode(ids, skip_special=False), add_special=False)

    def curve(self, rows: list[int], context: int, repeats: int) -> dict[str, Any]:
        from foretell.lab.forward import forward_curve

        return forward_curve(self.llm.model, rows, context, repeats)

    def bandwidth(self) -> float | None:
        """Bytes a second that the threads stream from memory."""
        if self.cuda:
            return None
        from foretell.lab.forward import bandwidth

        stream = bandwidth()
        return max(stream() for _ in range(5))

    def device_peak(self) -> int | None:
        """Bytes of accelerator memory at the highest since the last run began."""
        if not self.cuda:
            return None
        import torch

        return torch.cuda.max_memory_allocated()

    def _params(self, max_tokens: int) -> Any:
        from foretell.core.params import SamplingParams

        c = self.config
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=c["temperature"],
            seed=c["seed"],
            ignore_eos=c["ignore_eos"],
        )

    def _method(self, mode: str) -> Any:
        if mode not in self.ready:
            parts = self.config["methods"][mode]
            draft = parts["draft"]
            if draft == "auto":
                draft = "draft-model" if self.llm.context.default_draft else "prompt-lookup"
            self.ready[mode] = self.llm.with_methods(
                draft,
                parts["verify"],
                parts["policy"],
                max_batch=self.config["batch"],
                allow_lossy=self.config["allow_lossy"],
            )
        return self.ready[mode]


def _dtype(model: Any) -> str:
    kind = getattr(model, "format", None) or getattr(model, "dtype", "")
    return str(kind).removeprefix("torch.")


def _sum(rows: list[list[int]]) -> list[int]:
    total = [0] * max((len(r) for r in rows), default=0)
    for row in rows:
        for i, n in enumerate(row):
            total[i] += n
    return total
