"""transformers as a system of the bench: greedy, prompt lookup, assisted generation."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from foretell.lab.bench.workers.steps import Steps

LOOKUP = 10  # drafted tokens; transformers has no default of its own for prompt lookup


class System:
    """Times come from a streamer, which `generate` calls once a step."""

    def load(self, config: dict[str, Any]) -> dict[str, Any]:
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.set_num_threads(config["threads"])
        self.config, self.torch = config, torch
        asked = config["dtype"]
        dtype = asked if asked in ("float32", "bfloat16", "float16") else "bfloat16"
        self.dtype = getattr(torch, dtype)
        self.device = config["device"]
        self.model = self._load(config["model"])
        self.assistant: Any = None
        return {
            "version": version("transformers"),
            "torch": torch.__version__,
            "dtype": dtype,
            "same_class": dtype == asked,
            "threads": torch.get_num_threads(),
        }

    def _load(self, folder: str) -> Any:
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
        model = model.to(self.device).eval()
        generation = model.generation_config
        eos = None if self.config["ignore_eos"] else (self.config["eos"] or None)
        generation.eos_token_id, generation.pad_token_id = eos, 0
        # what a checkpoint's generation_config.json says about sampling is not what is measured
        for name, value in (("temperature", None), ("top_p", None), ("top_k", None)):
            setattr(generation, name, value)
        generation.repetition_penalty = None
        return model

    def modes(self, wanted: list[str]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for mode in wanted:
            kind = self.config["modes"][mode]["mode"]
            found[mode] = None
            if kind != "plain" and self.config["batch"] > 1:
                found[mode] = "assisted generation of transformers has no batches"
            elif kind == "draft" and not self.config["draft"]:
                found[mode] = "there is no draft model"
            elif kind == "draft" and self.assistant is None:
                self.assistant = self._load(self.config["draft"])
        return found

    def run(self, mode: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        torch, config = self.torch, self.config
        chosen = config["modes"][mode]
        extra: dict[str, Any] = {}
        if chosen["mode"] == "lookup":
            extra["prompt_lookup_num_tokens"] = chosen["tokens"] or LOOKUP
        elif chosen["mode"] == "draft":
            extra["assistant_model"] = self.assistant
            if chosen["tokens"]:
                settings = self.assistant.generation_config
                settings.num_assistant_tokens = chosen["tokens"]
                settings.num_assistant_tokens_schedule = "constant"
                settings.assistant_confidence_threshold = 0.0
        if config["temperature"] > 0:
            torch.manual_seed(config["seed"])
            extra |= {"do_sample": True, "temperature": config["temperature"], "top_k": 0}
        else:
            extra["do_sample"] = False
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        steps = Steps(len(prompts))
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask.to(self.device),
                max_new_tokens=max_tokens,
                streamer=_Streamer(steps, len(prompts)) if len(prompts) == 1 else None,
                **extra,
            )
        steps.stop()
        answers = [row[width:].tolist() for row in out]
        if len(prompts) > 1:  # generate streams no batches
            return _without_phases(steps, answers)
        return steps.result(answers)


def _without_phases(steps: Steps, answers: list[list[int]]) -> dict[str, Any]:
    result = steps.result(answers)
    return result | {"first_s": None, "ttft_s": None, "first_tokens": None, "steps": None}


class _Streamer:
    """The prompt is put first, then the tokens of each step."""

    def __init__(self, steps: Steps, sequences: int) -> None:
        self.steps, self.prompt = steps, True

    def put(self, value: Any) -> None:
        if self.prompt:
            self.prompt = False
        else:
            self.steps.add(value.numel())

    def end(self) -> None:
        pass
