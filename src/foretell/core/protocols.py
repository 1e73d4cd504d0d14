"""The parts that plug into the engine. Protocols: implementations need no base class.

Notation everywhere: p target, q draft, B sequences, N nodes of a tree, T packed rows,
V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from foretell.core.batch import Output, PackedBatch, Tap
from foretell.core.feedback import Feedback, Verdict
from foretell.core.rng import SeqRng
from foretell.core.stop import PathStop
from foretell.core.tree import TokenTree

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from foretell.core.params import SamplingParams, Speculation


class Promise(StrEnum):
    """What a method promises about the output (docs/architecture.md, 'promises')."""

    EXACT = "exact"  # token for token the output of plain decoding with the same seed
    LOSSLESS = "lossless"  # exactly the target's distribution
    LOSSY = "lossy"  # changes the distribution; opt-in only


class Draw(Enum):
    """How drafters that have a distribution should draw from it, for one sequence."""

    TOP = "top"  # the most probable tokens (greedy decoding)
    NOISE = "noise"  # argmax(q / E) with the target's own noise E of that position (replay)
    SAMPLE = "sample"  # draw from q with noise of one's own and hand the q rows over (rejection)
    IID = "iid"  # as SAMPLE, but siblings with replacement, each with a q row of its own
    TOP_ONE = "top-one"  # one draw and, beside it, the most probable tokens (see below)
    PATHS = "paths"  # K independent chains, drawn as IID and merged into a trie (see below)

    # How q rows tell a verifier what was drawn: siblings that share a row were drawn from it
    # without replacement, in order; siblings with rows of their own (equal in value)
    # independently; row -1 was not drawn at all. For k children of a node with distribution q:
    # - SAMPLE: k draws without replacement, one shared row q.
    # - IID: k independent draws; each node has its own row (a copy of q). A draw that repeats an
    #   earlier sibling stays, as a DEAD node without children: it costs no forward row, and its
    #   refusal counts.
    # - TOP_ONE: S = the k - 1 most probable tokens. FIRST sibling: one draw from q without S,
    #   renormalised, with that distribution as its row; then S in order, row -1 (one-hot). Where
    #   q has no mass outside S there is no first sibling. k = 1 is SAMPLE.
    # - PATHS: K chains of one length L, each drawn from q token by token, independently. At a node
    #   the children are the next tokens of all chains through it, with rows as in IID; a repeated
    #   one is DEAD as in IID, and its chain goes on below the first sibling with its token. K and
    #   L never depend on what was drawn: L = nodes // K.
    # For chains SAMPLE, IID, TOP_ONE and PATHS are the same. A drafter says in an optional
    # attribute `draws: frozenset[Draw]` which it can do beyond TOP, NOISE and SAMPLE; the engine
    # refuses a pair whose rule wants another, unless the drafter hands over no q rows (one-hot
    # drafts fit all) or drafts nothing but chains (which it is then asked to SAMPLE).

    @property
    def from_q(self) -> bool:
        """Whether the rule wants draws from q, q rows handed over."""
        return self not in (Draw.TOP, Draw.NOISE)


@dataclass(frozen=True, slots=True)
class Caps:
    """What a model can do."""

    tree: bool = True  # attention by ancestors; without it the engine clamps to chains
    rollback: bool = True  # caches can undo rows; without it nothing can be drafted
    layer_access: bool = False
    recurrent: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts about a model."""

    vocab: int
    hidden: int
    layers: int
    max_positions: int  # longest context
    caps: Caps = Caps()
    name: str = ""
    row_bytes: int = 0  # bytes of one KV row, all layers; 0 = unknown
    weight_bytes: int = 0  # bytes of weights a forward with logits reads; 0 = unknown


@runtime_checkable
class KVCache(Protocol):
    """The key/value rows of ONE sequence in one model."""

    n: int  # committed rows

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all without changing anything else."""
        ...

    def truncate(self, n: int) -> None:
        """Forget rows n.. ; raises NoRollback where the model cannot undo them."""
        ...

    def copy_prefix(self, other: KVCache, n: int) -> None:
        """Become a copy of the first n rows of `other` (same model); self must be empty."""
        ...

    def check(self) -> None:
        """Raise AssertionError when an invariant is broken (tests)."""
        ...


class Txn(Protocol):
    """Scratch rows over B caches; several forwards may run in one. Leaving it without `commit`
    rolls everything back."""

    caches: Sequence[KVCache]
    scratch: list[int]  # rows added so far to each cache

    def __enter__(self) -> Txn: ...
    def __exit__(self, *exc: object) -> None: ...

    def advance(self, batch: PackedBatch) -> None:
        """Count the rows of `batch`, which a forward has just written behind the scratch rows."""
        ...

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep, for each cache, the scratch rows `paths[b]` (strictly increasing); drop the rest.
        Closes the transaction."""
        ...


@runtime_checkable
class TargetModel(Protocol):
    """A causal language model that scores trees. Target and draft models are the same thing."""

    spec: ModelSpec
    device: torch.device

    def new_cache(self, rows: int = 0) -> KVCache: ...

    def open(self, caches: Sequence[KVCache]) -> Txn: ...

    def forward(self, batch: PackedBatch, txn: Txn, taps: Sequence[Tap] = ()) -> Output:
        """Run all layers over `batch`; its rows become scratch rows of `txn`.
        Logits come back in float32."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """[n] int64 -> [n, H], as layer 0 reads it."""
        ...

    def unembed(self, hidden: Tensor) -> Tensor:
        """[n, H] after the last layer (before the final norm) -> logits [n, V] float32."""
        ...


@runtime_checkable
class LayerAccess(Protocol):
    """Models that can run some of their layers (self-speculation)."""

    def run_layers(
        self, hidden: Tensor, batch: PackedBatch, txn: Txn, layers: Sequence[int]
    ) -> Tensor:
        """[T, H] -> [T, H] through `layers`, which write their K/V at the scratch rows that begin
        at `txn.scratch`; call `txn.advance(batch)` once all wanted layers have run."""
        ...


class Races(Protocol):
    """Models that can sample from a row of their logits without a softmax."""

    def race(self, logits: Tensor, temperature: float, key: int) -> int:
        """``argmax(softmax(logits / temperature) / E)`` for logits [V] and the row of noise E of
        `SeqRng.key`, as float32 arithmetic has it; -1 where it is too close to call."""
        ...


class Ranks(Protocol):
    """Models that find the largest entries of rows of their logits quicker than numpy."""

    def topk(
        self, rows: Tensor, k: int, at: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What `core.rows.topk_rows` says of rows [n, V], to the bit; None: ask it."""
        ...


class Chains(Protocol):
    """Models that can feed their own tokens back, where nobody has to look at the rows."""

    def chains(
        self,
        batch: PackedBatch,
        txn: Txn,
        levels: Sequence[int],
        ends: Callable[[int, float], bool] | Sequence[PathStop] | None = None,
        draws: Sequence[tuple[float, Sequence[int]]] | None = None,
    ) -> list[tuple[list[int], list[float]]] | None:
        """`forward` of a batch of which every segment wants the logits of its last row alone, then
        of the token that row says, and so on: for each sequence b a chain of up to levels[b] >= 1
        tokens and their probabilities. All but the last token of each chain are scratch rows of
        `txn` then. None: do it forward by forward.

        ends(b, probability): whether a chain that could go on ends with this token; or ends[b], all
        of the same edges, which are not called; without any nobody asks, and the probabilities are
        left out. draws[b]: a temperature and for each level
        a key, of which `Races.race` makes the token; temperature 0, or no draws: the most probable
        token, the lowest id among equals."""
        ...


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter needs from the engine; checked once, at start-up."""

    taps: tuple[Tap, ...] = ()  # hidden states of the target it reads
    logits: bool = False  # raw logits of every drafted node, not only those the verifier asks for
    prompt_logits: bool = False  # raw logits of CONTEXT nodes too
    own_model: bool = False  # loads a model of its own
    layer_access: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """How much one sequence may draft in one step. Zero nodes or depth: draft nothing."""

    nodes: int
    depth: int
    branching: int = 1 << 30  # 1 = chain only
    stop: Callable[[Sequence[float]], bool] | None = None
    """Asked after each kept token with the scores of the tokens kept so far on that path; true
    stops drafting below it. It never sees a token that is not kept: that would bias sampling."""
    unsure: Callable[[Sequence[float]], bool] | None = None
    """As `stop`, but asked with the entropies, in nats, of the draft distributions that those
    tokens were taken from. Drafters without distributions do not ask."""
    free: bool = False  # whether the policy leaves it to the drafter how deep to go, up to `depth`

    def clamp(self, *, nodes: int, depth: int, branching: int = 1 << 30) -> Budget:
        return Budget(
            max(0, min(self.nodes, nodes)),
            max(0, min(self.depth, depth)),
            min(self.branching, branching),
            self.stop,
            self.unsure,
            self.free,
        )

    @property
    def none(self) -> bool:
        return self.nodes <= 0 or self.depth <= 0


def _softmax(logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
    return logits.softmax(-1)


@dataclass(slots=True)
class SeqView:
    """What drafters, policies and verifiers may see of a sequence. Read-only by agreement."""

    tokens: list[int]  # all committed ids: prompt, then output
    prompt_len: int
    params: SamplingParams
    rng: SeqRng
    draw: Draw = Draw.TOP
    cached: int = 0  # rows in the target's cache
    warp: Callable[[Tensor, Sequence[Sequence[int]]], Tensor] = _softmax
    """The target's own sampling processors: raw logits [k, V] and, for each row, the drafted ids
    before it -> distributions [k, V] with the target's penalties, temperature (1 when greedy) and
    filters."""
    plain: bool = True
    """No processor but temperature: the order of the logits is the order of the probabilities."""
    effort: Any = None  # what the length policy has learned of this sequence
    cache: KVCache | None = None
    """The target's own cache of the sequence, for drafters that run its layers: they may open a
    transaction on it inside `propose` or `observe` and must roll it back."""
    control: Speculation | None = None  # what the request wants of speculation; None = no wish

    @property
    def most_drafts(self) -> int:
        """Most nodes a step may draft for it, by its own wish."""
        return 1 << 30 if self.control is None else self.control.limit

    @property
    def pending(self) -> list[int]:
        """Committed ids whose rows are missing: at least one when ready to decode."""
        return self.tokens[self.cached :]


class Drafter(Protocol):
    """Proposes trees. State per sequence lives in what `begin` returns: drafters are shareable.

    An attribute is optional: ``reads_text: bool``, that `observe` does nothing, for all it learns
    from is the committed text.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise]
    paper: ClassVar[str]
    needs: Needs
    shapes: frozenset[str]  # what its trees may hold, of {"chain", "tree", "onehot", "q"}

    def begin(self, view: SeqView) -> Any: ...

    def propose(
        self, states: Sequence[Any], views: Sequence[SeqView], budgets: Sequence[Budget]
    ) -> list[TokenTree]:
        """One tree a sequence; its first nodes are `view.pending`. Within the budget; no draft is
        always a right answer. A drafter whose state covers tokens[:k] first catches up with
        tokens[k:]: it may have slept for any number of steps."""
        ...

    def observe(self, states: Sequence[Any], feedback: Sequence[Feedback]) -> None: ...

    def end(self, state: Any) -> None: ...


class TargetRows(Protocol):
    """The target's processed rows of one sequence, computed when asked for.

    An attribute is optional: ``said: dict[int, int] | None``, what `greedy` says of every node with
    a row, where that is known already.
    """

    deterministic: bool  # temperature 0: the token after a node is `greedy` of it
    host: bool  # the rows lie on the host: to ask node by node, as the walk goes, costs least

    def greedy(self, nodes: Sequence[int]) -> list[int]:
        """Argmax of the processed logits at each node; ties go to the lowest id."""
        ...

    def probs(self, nodes: Sequence[int], read: Sequence[int] | None = None) -> Tensor:
        """[k, V] float32: the distributions of the token after each node (at temperature 0 those
        of temperature 1). read: nodes whose logits to process in the places of `nodes`."""
        ...

    def raw(self, node: int) -> tuple[Tensor, float] | None:
        """(raw logits [V], temperature) where the distribution after a node is no more than their
        softmax."""
        ...

    def hidden(self, tap: Tap, nodes: Sequence[int]) -> Tensor:
        """[k, H]: hidden states of the target at `nodes`, of a tap in the rule's `needs`."""
        ...


class Draws(Protocol):
    """The random numbers a verifier may use (`SeqRng`, or a test's enumerator)."""

    def key(self, position: int, purpose: Any) -> int: ...
    def flip(self, p: float, w: float, position: int, index: int) -> bool: ...
    def pick(self, p: Tensor, position: int, purpose: Any = ...) -> int: ...
    def race(self, positions: Sequence[int], purpose: Any, vocab: int, device: Any) -> Tensor: ...


class Verifier(Protocol):
    """Decides which drafted tokens stand. `position` is the absolute index of the token that the
    tip's row predicts.

    Two attributes are optional. ``needs: Needs`` names the taps whose hidden states the rule reads
    through `TargetRows.hidden`. ``extend(tree, view, room) -> TokenTree`` adds up to `room` RIDER
    nodes behind the nodes of a drafted tree, to be computed in the same forward.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise]
    paper: ClassVar[str]
    accepts: ClassVar[frozenset[str]]  # of {"chain", "tree", "onehot", "q"}
    draw: ClassVar[Draw]

    def __call__(self, tree: TokenTree, p: TargetRows, rng: Draws, position: int) -> Verdict: ...


@dataclass(slots=True)
class Load:
    """How busy the engine is when budgets are set."""

    running: int = 0
    waiting: int = 0
    free_rows: int = 1 << 30


@dataclass(slots=True)
class Timings:
    """Seconds one step spent in its parts."""

    draft: float = 0.0
    target: float = 0.0
    verify: float = 0.0
    rows: int = 0  # T of the target forward
    context: int = 0  # committed rows the forward read, summed over its sequences
    sequences: int = 0  # B
    decoding: bool = True  # whether all rows were drafts but one a sequence: none of a prompt
    other: float = 0.0  # between the step before and this one; 0 when nothing ran in between


class CostModel(Protocol):
    """What a target forward costs on this machine, in seconds. Policies and trees size drafts
    with it; the engine tells it what every forward really took."""

    def seconds(self, rows: int, context: int = 0, sequences: int = 1) -> float:
        """One forward of `rows` rows in all, whose sequences hold `context` committed rows in
        all. The first call may measure the model for some seconds."""
        ...

    def observe(self, rows: int, context: int, sequences: int, seconds: float) -> None: ...


class LengthPolicy(Protocol):
    """How much to draft.

    A method is optional: ``trim(trees) -> trees`` gets what was drafted for the views of the last
    `budgets`, in their order, and may leave out nodes that have no q row.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    def budgets(self, views: Sequence[SeqView], load: Load) -> list[Budget]: ...

    def observe(
        self, trees: Sequence[TokenTree], verdicts: Sequence[Verdict], timings: Timings
    ) -> None: ...


@dataclass(slots=True)
class NodeMasks:
    """Which tokens may follow each node, and which nodes are legal themselves."""

    bits: np.ndarray  # [N, ceil(V / 32)] int32, bit set = allowed
    legal: np.ndarray  # [N] bool


class Constraint(Protocol):
    """A grammar, schema or word list bound to one sequence."""

    def masks(self, tree: TokenTree) -> NodeMasks:
        """Leaves the state unchanged."""
        ...

    def forced(self) -> list[int]:
        """The run of ids that are the only legal ones after the committed text."""
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """The only mutation."""
        ...


@dataclass(slots=True)
class BuildContext:
    """What the engine hands to a method's `build` when it is created from a spec."""

    target: TargetModel
    tokenizer: Any = None
    load_model: Callable[..., TargetModel] | None = None  # (path, **options) -> a draft model
    default_draft: str | None = None  # path of the drafter that ships with the target
    cost: CostModel | None = None  # what forwards of the target cost here; None = unknown
    extras: dict[str, Any] = field(default_factory=dict)
