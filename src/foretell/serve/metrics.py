"""Prometheus: what a service counts, under vLLM's names with our prefix.

Every app has a registry of its own. Counters and gauges are read from the service's snapshot when
somebody scrapes; only the histograms are filled as requests end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from foretell.serve.service import Service
from foretell.serve.terms import JobSummary, Snapshot

PREFIX = "foretell:"
_REQUEST = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_FIRST = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5, 10, 20, 40, 80)
_TOKEN = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2)
_COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_HISTOGRAMS = (  # name, field of JobSummary, buckets, help
    ("time_to_first_token_seconds", "first_token_s", _FIRST, "From arrival to the first token."),
    ("time_per_output_token_seconds", "per_token_s", _TOKEN, "Per token after the first."),
    ("e2e_request_latency_seconds", "latency_s", _REQUEST, "From arrival to the last token."),
    ("request_queue_time_seconds", "queue_s", _FIRST, "From arrival to the first step."),
    ("request_prompt_tokens", "prompt_tokens", _COUNT, "Prompt tokens of a request."),
    ("request_generation_tokens", "generated_tokens", _COUNT, "Generated tokens of a request."),
)
_GAUGES = (
    ("num_requests_running", "running", "Sequences in the batch."),
    ("num_requests_waiting", "waiting", "Sequences in the queue."),
    ("kv_cache_rows", "kv_rows", "Rows of the KV cache."),
    ("kv_cache_used_rows", "kv_used", "Rows held by live sequences."),
    ("kv_cache_kept_rows", "kv_kept", "Rows of finished sequences, kept for prompts to come."),
    ("goodput_tokens_per_second", "tokens_per_second", "Tokens a second, over the last seconds."),
)
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens_total", "Prompt tokens taken in."),
    ("generation_tokens", "generated_tokens_total", "Tokens generated."),
    ("num_preemptions", "preemptions_total", "Sequences put back into the queue."),
    ("prefix_cache_hits", "prefix_hit_tokens_total", "Prompt tokens whose rows were there."),
    ("spec_decode_num_drafts", "num_drafts_total", "Drafts verified."),
    ("spec_decode_num_draft_tokens", "draft_tokens_total", "Tokens drafted."),
    ("spec_decode_num_accepted_tokens", "accepted_tokens_total", "Drafted tokens accepted."),
    ("steps", "steps_total", "Forwards of the target."),
)


class Metrics:
    """The metrics of one service. Hand `observe` to the service as its `on_done`."""

    def __init__(self, model: str) -> None:
        self.labels = {"model_name": model}
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._histograms = []
        for name, field, buckets, text in _HISTOGRAMS:
            made = Histogram(
                PREFIX + name, text, list(self.labels), buckets=buckets, registry=self.registry
            )
            self._histograms.append((field, made.labels(**self.labels)))

    def watch(self, service: Service) -> None:
        """Read the counters of `service` from now on."""
        self.registry.register(_Reader(service, self.labels))

    def observe(self, job: JobSummary) -> None:
        """Called once for every request that ended."""
        if job.reason not in ("stop", "length"):
            return
        for field, histogram in self._histograms:
            value = getattr(job, field)
            if value is not None:
                histogram.observe(value)

    def page(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _Reader:
    """Turns a snapshot into metric families at every scrape."""

    def __init__(self, service: Service, labels: Mapping[str, str]) -> None:
        self._service, self._labels = service, dict(labels)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._service.snapshot()
        for name, field, text in _GAUGES:
            yield self._gauge(name, text, getattr(now, field))
        used = now.kv_used / now.kv_rows if now.kv_rows else 0.0
        yield self._gauge(
            "kv_cache_usage_perc", "Share of the rows that live sequences hold.", used
        )
        for name, field, text in _COUNTERS:
            yield self._counter(name, text, {(): getattr(now, field)})
        yield from self._labelled(now)

    def _labelled(self, now: Snapshot) -> Iterator[Metric]:
        text = "Drafted tokens accepted, by their place in the draft."
        places = {(str(i),): n for i, n in enumerate(now.accepted_per_pos)}
        name = "spec_decode_num_accepted_tokens_per_pos"
        yield self._counter(name, text, places, "position")
        good = {(r,): n for r, n in now.requests_total.items()}
        yield self._counter(
            "request_success", "Requests by how they ended.", good, "finished_reason"
        )
        lengths = {(str(k),): n for k, n in sorted(now.draft_lengths.items())}
        text = "Decisions of the length policy, by the length it chose."
        yield self._counter("policy_decisions", text, lengths, "length")
        why = {(r,): n for r, n in now.why_off.items()}
        text = "Decisions to draft nothing, by reason."
        yield self._counter("policy_off", text, why, "reason")
        parts = ("draft", "target", "verify")
        spent: dict[tuple[str, ...], Any] = {
            (p,): getattr(now, f"{p}_seconds_total") for p in parts
        }
        yield self._counter("step_seconds", "Seconds spent in steps, by part.", spent, "part")

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(
        self, name: str, text: str, values: Mapping[tuple[str, ...], float], *labels: str
    ) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=[*self._labels, *labels])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), *key], value)
        return family
