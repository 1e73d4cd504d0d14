"""What a server says of itself and of a request: limits, numbers, and how a request can fail."""

from __future__ import annotations

from dataclasses import dataclass, field

from foretell.core.errors import ForetellError

REASONS = ("stop", "length", "cancelled", "timeout", "error")


class QueueFull(ForetellError):
    """More requests wait than may; try again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(ForetellError):
    """The server is about to stop and takes no new requests."""


class Timeout(ForetellError):
    """The request took longer than it may."""


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    max_queue: requests that may wait for a place; more are refused. timeout: seconds a request may
    take in all, queueing included. stream_idle: seconds an open stream may go without news.
    """

    max_queue: int = 256
    timeout: float | None = None
    stream_idle: float = 60.0


@dataclass(slots=True)
class JobSummary:
    """One finished request in numbers, for histograms; seconds."""

    id: str
    reason: str  # stop, length, cancelled, timeout, error
    prompt_tokens: int
    generated_tokens: int
    queue_s: float
    first_token_s: float | None  # from arrival
    per_token_s: float | None  # after the first
    latency_s: float


@dataclass(slots=True)
class Snapshot:
    """Where the server stands. Totals count since the start."""

    running: int = 0  # sequences being decoded or prefilled
    waiting: int = 0  # requests without a place, or preempted sequences
    streams: int = 0  # open ones
    kv_rows: int = 0
    kv_used: int = 0  # rows of live sequences
    kv_kept: int = 0  # rows of finished ones, kept for prompts that begin alike
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    requests_total: dict[str, int] = field(default_factory=dict)  # by reason, as in JobSummary
    preemptions_total: int = 0
    prefix_hit_tokens_total: int = 0
    num_drafts_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)
    draft_lengths: dict[int, int] = field(default_factory=dict)  # decisions by length, 0 included
    why_off: dict[str, int] = field(default_factory=dict)  # decisions for 0, by reason
    steps_total: int = 0
    draft_seconds_total: float = 0.0
    target_seconds_total: float = 0.0
    verify_seconds_total: float = 0.0
    tokens_per_second: float = 0.0  # over the last seconds
    draining: bool = False


def said(error: Exception) -> ForetellError:
    """What a client is told of it: one sentence."""
    if isinstance(error, ForetellError):
        return error
    what = " ".join(str(error).split())[:200]
    return ForetellError(f"The engine failed on this request ({type(error).__name__}: {what}).")
