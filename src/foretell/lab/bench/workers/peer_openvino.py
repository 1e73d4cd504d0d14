"""OpenVINO GenAI as a system of the bench: plain, prompt lookup, draft model.

A pipeline is built for one way of decoding, so each mode is a worker of its own (`ALONE`).
"""

from __future__ import annotations

from typing import Any

from foretell.lab.bench.workers.steps import Steps

ALONE = True
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class System:
    """One request at a time; times come from a streamer."""

    def load(self, config: dict[str, Any]) -> dict[str, Any]:
        import openvino  # pyright: ignore[reportMissingImports]
        import openvino_genai  # pyright: ignore[reportMissingImports]

        self.config, self.api, self.openvino = config, openvino_genai, openvino
        (chosen,) = config["modes"].values()
        self.chosen, self.pipeline = chosen, None
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": config["threads"],
            "PERFORMANCE_HINT": "LATENCY",
        }
        precision = PRECISIONS.get(config["dtype"])
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
            settings["KV_CACHE_PRECISION"] = precision
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # a prompt that comes again is computed again
        scheduler.cache_size = 1  # GB
        settings["scheduler_config"] = scheduler
        if chosen["mode"] == "lookup":
            settings["prompt_lookup"] = True
        if chosen["mode"] == "draft" and config["draft_file"]:
            own = {k: v for k, v in settings.items() if k != "scheduler_config"}
            settings["draft_model"] = openvino_genai.draft_model(config["draft_file"], "CPU", **own)
        self.reason = self._reason()
        if self.reason is None:
            self.pipeline = openvino_genai.LLMPipeline(config["file"], "CPU", **settings)
        return {
            "version": openvino_genai.get_version(),
            "openvino": openvino.get_version(),
            "threads": config["threads"],
            "dtype": config["file_dtype"],
            "same_class": True,
            "settings": {k: str(v) for k, v in settings.items() if isinstance(v, str | int)},
        }

    def _reason(self) -> str | None:
        if self.config["batch"] > 1:
            return "this adapter decodes one request at a time"
        if self.chosen["mode"] == "draft" and not self.config["draft_file"]:
            return "there is no draft model"
        return None

    def modes(self, wanted: list[str]) -> dict[str, str | None]:
        return dict.fromkeys(wanted, self.reason)

    def run(self, mode: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        import numpy as np

        c = self.config
        settings = self.api.GenerationConfig()
        settings.max_new_tokens = max_tokens
        settings.ignore_eos = c["ignore_eos"]
        if c["eos"] and not c["ignore_eos"]:
            settings.eos_token_id = c["eos"][0]
            settings.stop_token_ids = set(c["eos"])
        settings.apply_chat_template = False
        if c["temperature"] > 0:
            settings.do_sample, settings.temperature = True, c["temperature"]
            settings.rng_seed = c["seed"]
        else:
            settings.do_sample = False
        kind = self.chosen["mode"]
        if kind != "plain":
            settings.num_assistant_tokens = self.chosen["tokens"] or 5  # GenAI's own default
            if kind == "lookup":
                settings.max_ngram_size = 3
        assert self.pipeline is not None
        ids = self.openvino.Tensor(np.asarray(prompts, np.int64))
        streamer = _streamer(self.api)
        steps = streamer.steps = Steps()
        out = self.pipeline.generate(ids, settings, streamer)
        steps.stop()
        found = [list(t) for t in out.tokens]
        return steps.result(found, **_speculation(out))


def _streamer(api: Any) -> Any:
    class Streamer(api.StreamerBase):
        def write(self, token: Any) -> Any:
            self.steps.add(1 if isinstance(token, int) else len(token))
            return api.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Streamer()


def _speculation(out: Any) -> dict[str, Any]:
    extended = getattr(out, "extended_perf_metrics", None)
    drafted = getattr(extended, "get_num_draft_tokens", None)
    return {"drafted": int(drafted())} if drafted is not None else {}
