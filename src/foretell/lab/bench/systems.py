"""The systems of a run: which worker runs which method, started, loaded and asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foretell.core.errors import InputError
from foretell.lab.bench import exports, provenance
from foretell.lab.bench.methods import PLAIN, Method, PeerMode
from foretell.lab.bench.process import Worker, WorkerFailed

Facts = dict[str, Any]
OWN = "foretell"
ALONE = ("openvino",)  # systems whose modes each need a process
SETTLE_TOKENS, SETTLE_PROMPT = 4, 16


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what the figures mean."""

    methods: Sequence[Method]
    peers: Sequence[PeerMode] = ()
    model: str | None = None
    draft_path: str | None = None
    max_tokens: int = 128
    repeats: int = 3
    batch: int = 1
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    ignore_eos: bool = False
    allow_lossy: bool = False
    chat: bool = True
    cut: bool = False
    peer_python: str | None = None
    memory: bool = True
    curve: bool = True

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


@dataclass(slots=True)
class Hooks:
    """How a run tells what it is doing."""

    note: Callable[[str], None] = lambda text: None
    stage: Callable[[str, int], Callable[[int], None]] = lambda name, total: lambda n: None


@dataclass(slots=True)
class Place:
    """Where a method runs."""

    worker: Worker
    facts: Facts
    dead: bool = False


@dataclass(slots=True)
class Systems:
    """The workers of one run; methods of foretell share one. Use as a context manager."""

    settings: Settings
    exports: Path
    hooks: Hooks
    places: dict[str, Place] = field(default_factory=dict)
    loaded: dict[str, Facts] = field(default_factory=dict)  # by system
    left_out: list[str] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Systems:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    @property
    def own(self) -> Place:
        return self.places[PLAIN]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple({p.worker.pid for p in self.places.values()})

    def start_own(self) -> Facts:
        """Load the target; InputError when it or a method is unusable."""
        self.hooks.note("loading the model")
        methods = self.settings.methods
        worker = self.stack.enter_context(self._own_worker(OWN))
        facts = usable(worker, "load", config=self._own_config(methods))
        reasons = usable(worker, "modes", wanted=[m.name for m in methods])
        for method, reason in reasons.items():
            if reason is not None:
                raise InputError(f"--methods {method}: {reason}")
        for m in methods:
            promise = usable(worker, "promise", mode=m.name)
            self.places[m.name] = Place(worker, {**facts, "system": OWN, "promise": promise})
        self.loaded[OWN] = facts
        return facts

    def start_peers(self) -> None:
        by_system: dict[str, list[PeerMode]] = {}
        for peer in self.settings.peers:
            by_system.setdefault(peer.system, []).append(peer)
        for system, modes in by_system.items():
            for group in [[m] for m in modes] if system in ALONE else [modes]:
                self._start_peer(group)

    def _start_peer(self, modes: list[PeerMode]) -> None:
        title = modes[0].title
        self.hooks.note(f"loading {', '.join(m.name for m in modes)}")
        worker = self.stack.enter_context(self._peer_worker(modes[0].system))
        facts = self._load_peer(worker, modes)
        self.loaded[title] = facts
        reasons = usable(worker, "modes", wanted=[m.name for m in modes])
        for name, reason in reasons.items():
            if reason is not None:
                self.left_out.append(f"{name}: {reason}.")
            else:
                self.places[name] = Place(worker, {**facts, "system": title, "promise": None})

    def run(self, name: str, group: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        """Decode a group of prompts, after a short call of the same method that nobody times."""
        worker = self.places[name].worker
        settle = [list(p[:SETTLE_PROMPT]) for p in group]
        worker.ask("run", mode=name, prompts=settle, max_tokens=SETTLE_TOKENS)
        return worker.ask("run", mode=name, prompts=[list(p) for p in group], max_tokens=tokens)

    def fresh(self) -> None:
        """A new pass: what a method learned from a prompt must not help it when it comes again."""
        for place in {id(p.worker): p for p in self.places.values()}.values():
            if not place.dead:
                place.worker.ask("fresh")

    def bury(self, worker: Worker) -> list[str]:
        """A worker has died: the methods that are gone with it."""
        names = [n for n, p in self.places.items() if p.worker is worker]
        for name in names:
            self.places[name].dead = True
        return names

    def memory(self, longest: Sequence[Sequence[int]]) -> Iterable[tuple[str, str | None]]:
        """Load and run every method in a process of its own; yields (method, what went wrong)."""
        for name, place in self.places.items():
            if place.dead:
                continue
            try:
                place.facts["memory"] = self._memory(name, longest)
                yield name, None
            except (WorkerFailed, InputError) as error:
                yield name, str(error)

    def _memory(self, name: str, longest: Sequence[Sequence[int]]) -> dict[str, Any]:
        method = next((m for m in self.settings.methods if m.name == name), None)
        peer = next((p for p in self.settings.peers if p.name == name), None)
        with self._own_worker(name) if peer is None else self._peer_worker(peer.system) as worker:
            if method is not None:
                worker.ask("load", config=self._own_config([method]))
            elif peer is not None:
                self._load_peer(worker, [peer])
            worker.ask("modes", wanted=[name])
            tokens = min(self.settings.max_tokens, 32)
            call = {"mode": name, "prompts": longest, "max_tokens": tokens}
            worker.ask("run", **call)
            found = worker.ask("memory")
            found["accelerator_peak"] = worker.ask("device_peak")
            if worker.ask("reset_peak"):
                worker.ask("run", **call)
                found["decoding_peak"] = worker.ask("memory").get("peak")
        return found

    def _own_worker(self, name: str) -> Worker:
        return Worker(name, "own", env=self._env(True))

    def _peer_worker(self, system: str) -> Worker:
        own_file = system.endswith(".py")
        adapter = str(Path(system).expanduser()) if own_file else f"peer_{system}"
        title = Path(system).stem if own_file else system
        return Worker(title, adapter, self.settings.peer_python, self._env(False))

    def _own_config(self, methods: Sequence[Method]) -> dict[str, Any]:
        s = self.settings
        same = ("model", "draft_path", "dtype", "device", "threads", "batch", "temperature")
        return {
            **{k: getattr(s, k) for k in (*same, "seed", "ignore_eos", "allow_lossy")},
            "methods": {m.name: m.to_json() for m in methods},
        }

    def _env(self, own: bool) -> dict[str, str]:
        threads = str(self.settings.threads)
        env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        # what the command line gives its users, unless they set it themselves
        if own and "GOMP_SPINCOUNT" not in provenance.environment():
            env["GOMP_SPINCOUNT"] = "50000"
        return env

    def draft_folder(self) -> Path | None:
        text = self.settings.draft_path or self.loaded[OWN].get("default_draft")
        return Path(text).expanduser() if text else None

    def _load_peer(self, worker: Worker, modes: Sequence[PeerMode]) -> Facts:
        s, own = self.settings, self.loaded[OWN]
        folder, draft = Path(own["folder"]), self.draft_folder()
        system = modes[0].system
        files: Mapping[str, Any] = {"file": None, "draft_file": None, "file_dtype": None}
        if s.batch == 1 or system not in exports.FORMATS:
            files = exports.peer_files(
                system,
                folder,
                draft if any(m.mode == "draft" for m in modes) else None,
                own["dtype"],
                s.peer_python or sys.executable,
                self.exports,
                self.hooks.note,
            )
        config = {
            "model": str(folder),
            "draft": str(draft) if draft else None,
            "modes": {m.name: {"mode": m.mode, "tokens": m.tokens} for m in modes},
            "eos": own["eos"],
            "dtype": own["dtype"],
            "device": "cpu" if own["device"] == "cpu" else "cuda",
            "rows": own["max_positions"],
            **{k: getattr(s, k) for k in ("threads", "batch", "temperature", "seed", "ignore_eos")},
            **files,
        }
        try:
            return worker.ask("load", config=config)
        except WorkerFailed as error:
            hint = ""
            if error.kind in ("ModuleNotFoundError", "ImportError"):
                hint = " Install it (pip install 'foretell[peers]') or name another interpreter "
                hint += "with --peer-python."
            raise InputError(
                f"The peer {worker.name} cannot start: {str(error).rstrip('.')}.{hint}"
            ) from None


def usable(worker: Worker, do: str, **arguments: Any) -> Any:
    """Ask; what fails before anything is measured is the user's to mend."""
    try:
        return worker.ask(do, **arguments)
    except WorkerFailed as error:
        text = str(error) if worker.name == OWN else f"{worker.name}: {error}"
        raise InputError(text) from None
