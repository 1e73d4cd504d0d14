"""The bench: specs, workloads, statistics, summaries, comparison, workers. No model."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.core.errors import InputError
from foretell.lab.bench import figures, folder, machine, prompts, provenance, report
from foretell.lab.bench.compare import Run, compare, read_records
from foretell.lab.bench.exports import GGUF, OPENVINO, peer_files
from foretell.lab.bench.methods import Method, parse_methods, parse_peers, split
from foretell.lab.bench.process import Worker, WorkerFailed
from foretell.lab.bench.stats import bootstrap_ratio, pooled_deviation, t_quantile, wilcoxon
from foretell.lab.bench.summary import acceptance, count_tokens, decode_speed, stop_ids, summarise
from foretell.lab.bench.svg import svg
from foretell.lab.bench.workers.steps import Steps
from foretell.lab.bench.workloads import Item, load_workloads


class TestMethods:
    def test_a_comma_separates_only_what_is_no_option(self) -> None:
        text = "prompt-lookup,draft-model:tokens=4,branching=2;none+verify=rejection"
        expected = ["prompt-lookup", "draft-model:tokens=4,branching=2", "none+verify=rejection"]
        assert split(text) == expected

    def test_brackets_protect_what_they_enclose(self) -> None:
        assert split("a:x=[b;c,d],e") == ["a:x=[b;c,d]", "e"]

    def test_a_semicolon_always_separates(self) -> None:
        assert split("a:x=1;y=2,z=3") == ["a:x=1", "y=2,z=3"]

    def test_parts(self) -> None:
        none, method = parse_methods(["draft-model:tokens=4+policy=confidence:threshold=0.5"])
        assert none == Method("none")
        assert method.draft == "draft-model:tokens=4"
        assert method.policy == "confidence:threshold=0.5"
        assert method.verify == "auto"
        assert method.name == "draft-model:tokens=4+policy=confidence:threshold=0.5"

    def test_plus_in_a_value_is_no_separator(self) -> None:
        _, method = parse_methods(["draft-model:path=/a+b/c+name=mine"])
        assert (method.draft, method.name) == ("draft-model:path=/a+b/c", "mine")

    def test_plain_decoding_is_there_once(self) -> None:
        assert [m.name for m in parse_methods(["none,prompt-lookup", "prompt-lookup"])] == [
            "none",
            "prompt-lookup",
        ]

    def test_a_file_of_methods(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        path.write_text(
            '# comment\n{"draft": "prompt-lookup", "policy": "confidence", "name": "x"}\n'
            '{"method": "ngram", "num_speculative_tokens": 7}\n'
        )
        _, x, vllm = parse_methods([f"@{path}"])
        assert (x.name, x.policy) == ("x", "confidence")
        assert vllm.draft == "prompt-lookup:tokens=7"

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("promt-lookup", "prompt-lookup"),
            ("none+verify=wrong", "verifier"),
            ("none+policy=wrong", "policy"),
            ("tokens=4", "begins with an option"),
            ("none+verify=greedy+verify=replay", "twice"),
            ('{"draft": "none", "verfy": "greedy"}', "verify"),
            ("@/nowhere/at/all", "cannot be read"),
            ("none+policy=fixed,prompt-lookup+name=none", "called 'none'"),
        ],
    )
    def test_bad_specs(self, text: str, word: str) -> None:
        with pytest.raises(InputError, match=word):
            parse_methods([text])

    def test_peers(self) -> None:
        found = parse_peers(["transformers:plain,llamacpp:lookup+draft"], [3, 5])
        assert [p.name for p in found] == [
            "transformers/plain",
            "llamacpp/lookup:tokens=3",
            "llamacpp/lookup:tokens=5",
            "llamacpp/draft:tokens=3",
            "llamacpp/draft:tokens=5",
        ]
        assert len(parse_peers(["openvino"])) == 3
        with pytest.raises(InputError, match="transformers"):
            parse_peers(["transformer"])
        with pytest.raises(InputError, match="mode"):
            parse_peers(["openvino:medusa"])


class TestWorkloads:
    @pytest.mark.parametrize("name", ["random", "Random-Tokens", "dummy"])
    def test_random_tokens_are_refused(self, name: str) -> None:
        with pytest.raises(InputError, match="depends on the text"):
            load_workloads([name], None)

    def test_families_of_spec_bench(self, tmp_path: Path) -> None:
        (tmp_path / "spec_bench").mkdir()
        rows = [
            {"question_id": i, "category": c, "turns": ["a", "b"][: 1 + (c == "writing")]}
            for i, c in enumerate(["writing", "stem", "qa", "qa", "qa", "qa", "rag"])
        ]
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / "spec_bench" / "question.jsonl").write_text(text)
        (load,) = load_workloads(["spec-bench"], tmp_path)
        assert [i.family for i in load.items] == ["mt_bench"] * 2 + ["qa"] * 4 + ["rag"]
        assert load.items[0].turns == ["a", "b"]
        (few,) = load_workloads(["spec_bench"], tmp_path, limit=2)
        assert [i.key for i in few.items if i.family == "qa"] == [
            "spec_bench/qa/2",
            "spec_bench/qa/4",
        ]
        (one,) = load_workloads(["spec_bench"], tmp_path, families=["rag"])
        assert len(one.items) == 1
        assert one.to_json()["keys_sha256"] != few.to_json()["keys_sha256"]
        with pytest.raises(InputError, match="rag"):
            load_workloads(["spec_bench"], tmp_path, families=["rags"])

    def test_own_files(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.jsonl"
        path.write_text(
            '{"prompt": "p", "family": "x"}\n\n{"question": "q", "id": "k"}\n'
            '{"messages": [{"role": "user", "content": "m"}]}\n{"prompt": [1, 2]}\n'
        )
        (load,) = load_workloads([str(path)], None)
        assert [i.key for i in load.items] == ["mine/x/1", "mine/mine/k", "mine/mine/4",
                                               "mine/mine/5"]  # fmt: skip
        assert load.items[3].ids == [1, 2]

    @pytest.mark.parametrize(
        ("text", "word"),
        [("", "empty"), ("{", "no JSON"), ("3", "no JSON object"), ('{"a": 1}', "no prompt"),
         ('{"turns": []}', "no text"), ('{"messages": [{"role": "u"}]}', "messages"),
         ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "share an id")],
    )  # fmt: skip
    def test_bad_files(self, tmp_path: Path, text: str, word: str) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text(text)
        with pytest.raises(InputError, match=word):
            load_workloads([str(path)], None)

    def test_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--data"):
            load_workloads(["gsm8k"], None)
        with pytest.raises(InputError, match="no file"):
            load_workloads(["gsm8k"], tmp_path)
        with pytest.raises(InputError, match="gsm8k"):
            load_workloads(["gsm8"], tmp_path)

    def test_the_real_sets(self, data_dir: Path) -> None:
        names = ["spec_bench", "mt_bench", "humaneval", "gsm8k", "math500"]
        loads = load_workloads(names, data_dir, limit=3)
        assert {i.family for i in loads[0].items} == {
            "mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag",
        }  # fmt: skip
        assert len({i.family for i in loads[1].items}) == 8
        assert all(len(w.items) == 3 for w in loads[2:])
        assert "def " in (loads[2].items[0].raw or "")


class TestPrompts:
    def ask(self, do: str, **a: Any) -> Any:
        if do == "encode":
            if "ids" in a:
                return a["ids"]
            if "messages" in a:
                roles = [m["role"] for m in a["messages"]]
                assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
                return [len(m["content"]) for m in a["messages"]]
            return list(a["text"].encode())
        if do == "decode":
            return "x" * len(a["ids"])
        return a["ids"]  # round_trip

    def test_later_turns_follow_the_plain_answer(self) -> None:
        item = Item("k", "w", "f", ["ab", "cde"])
        found, skipped = prompts.encode_items(
            [(item, "f")], self.ask, lambda ids: [7, 7, 7, 7], chat=True, room=50, cut=False
        )
        assert [(p.key, p.ids) for p in found] == [("k#1", [2]), ("k#2", [2, 4, 3])]
        assert not skipped

    def test_without_a_template_the_raw_text_is_continued(self) -> None:
        item = Item("k", "w", "f", ["wrapped"], raw="raw")
        found, _ = prompts.encode_items(
            [(item, "f")], self.ask, list, chat=False, room=50, cut=False
        )
        assert bytes(found[0].ids) == b"raw"

    def test_long_prompts_are_skipped_or_lose_their_middle(self) -> None:
        item = Item("k", "w", "f", ["0123456789", "later"])
        found, skipped = prompts.encode_items(
            [(item, "f")], self.ask, list, chat=False, room=5, cut=False
        )
        assert not found
        assert skipped == {"f": 2}
        item.turns = ["0123456789"]
        found, skipped = prompts.encode_items(
            [(item, "f")], self.ask, list, chat=False, room=5, cut=True
        )
        assert bytes(found[0].ids) == b"01289"
        assert found[0].cut == 5

    @pytest.mark.parametrize(("changed", "fine"), [(1, True), (3, True), (10, False), (38, False)])
    def test_random_ids_are_no_prompt(self, changed: int, fine: bool) -> None:
        item = Item("k", "w", "f", ids=list(range(40)))

        def ask(do: str, **a: Any) -> Any:
            if do == "round_trip":
                return [1000 + t if t < changed else t for t in a["ids"]]
            return self.ask(do, **a)

        def encode() -> None:
            prompts.encode_items([(item, "f")], ask, list, chat=True, room=99, cut=False)

        if fine:
            encode()
            return
        with pytest.raises(InputError, match="means nothing"):
            encode()

    def test_units_hold_one_family(self) -> None:
        made = [prompts.Prompt(f"{f}{i}", f, 1, [i]) for i in range(3) for f in "ab"]
        found = prompts.units(made, 2)
        assert [(u.family, len(u.prompts)) for u in found] == [
            ("a", 2), ("a", 1), ("b", 2), ("b", 1),
        ]  # fmt: skip


class TestStats:
    @pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 7, 12, 40, 300])
    @pytest.mark.parametrize("p", [0.9, 0.975, 0.995, 0.9999])
    def test_t_quantile(self, df: int, p: float) -> None:
        t = pytest.importorskip("scipy.stats").t
        assert t_quantile(p, df) == pytest.approx(t.ppf(p, df), rel=2e-3)

    @given(st.lists(st.integers(-60, 60), min_size=1, max_size=40))
    def test_wilcoxon(self, values: list[int]) -> None:
        scipy = pytest.importorskip("scipy.stats")
        values = [v for v in values if v]
        if not values:
            assert wilcoxon(values) is None
            return
        ties = len({abs(v) for v in values}) < len(values)
        method = "approx" if ties or len(values) > 25 else "exact"
        right = scipy.wilcoxon(values, method=method, correction=True)
        assert wilcoxon(values) == pytest.approx(min(1.0, right.pvalue), abs=1e-6)

    def test_bootstrap_covers_the_truth(self) -> None:
        rng = random.Random(1)
        hits = 0
        for i in range(100):
            ratios = [math.exp(rng.gauss(0.2, 0.3)) for _ in range(30)]
            low, high = bootstrap_ratio(ratios, draws=400, seed=i) or (0, 0)
            hits += low < math.exp(0.2) < high
        assert 86 <= hits <= 99

    def test_one_prompt_has_no_interval(self) -> None:
        assert bootstrap_ratio([1.3]) is None

    def test_pooled_deviation(self) -> None:
        assert pooled_deviation([[1.0, 3.0], [10.0, 12.0], [5.0]]) == pytest.approx(math.sqrt(2))
        assert pooled_deviation([[1.0]]) is None


def record(method: str, key: str, repeat: int, speed: float, **more: Any) -> dict[str, Any]:
    """32 tokens, the first after half a second, the others at `speed` a second."""
    ids = [[5] * 32]
    return {
        "method": method, "key": key, "family": key[0], "repeat": repeat, "prompt_tokens": 9,
        "tokens": 32, "ids": ids, "first_s": 0.5, "ttft_s": 0.5, "first_tokens": 1,
        "seconds": 0.5 + 31 / speed, "steps": 32, "drafted": 0, "histogram": [32],
        "per_position": [], **more,
    }  # fmt: skip


def run_of(speeds: dict[str, float], noise: float, seed: int, repeats: int = 5) -> list[Any]:
    rng = random.Random(seed)
    return [
        record(m, f"{f}{i}", r, s * (1 + i / 9) * math.exp(rng.gauss(0, noise)))
        for m, s in speeds.items()
        for f in "ab"
        for i in range(6)
        for r in range(repeats)
    ]


FACTS = {
    "none": {"system": "foretell", "promise": "exact"},
    "fast": {"system": "foretell", "promise": "lossy"},
    "peer/plain": {"system": "peer", "promise": None},
}


class TestSummary:
    def test_speeds_and_speedups(self) -> None:
        speeds = {"none": 10.0, "fast": 25.0, "peer/plain": 5.0}
        found = summarise(run_of(speeds, 0.0, 0), FACTS)
        assert found["families"] == ["a", "b"]
        fast = found["methods"]["fast"]["by_family"]
        assert fast["overall"]["decode_speedup"]["ratio"] == pytest.approx(2.5)
        assert fast["a"]["decode_speedup"]["interval"] == pytest.approx((2.5, 2.5))
        assert fast["overall"]["decode_over"]["peer/plain"]["ratio"] == pytest.approx(5.0)
        assert 1 < fast["overall"]["whole_speedup"]["ratio"] < 2.5  # prefill is not sped up
        assert fast["b"]["prompts"] == 6
        assert fast["overall"]["ttft_ms"] == 500
        assert found["methods"]["none"]["noise"] == 0

    def test_the_median_of_the_repeats_counts(self) -> None:
        records = [record("none", "a", r, 10) for r in range(3)]
        records += [record("fast", "a", r, s) for r, s in enumerate((20, 20, 1))]
        found = summarise(records, FACTS)["methods"]["fast"]["by_family"]["overall"]
        assert found["decode_speedup"]["ratio"] == pytest.approx(2)
        assert found["spread"] == pytest.approx((20 - 1) / 20)

    def test_a_speed_is_total_tokens_over_total_time(self) -> None:
        records = [record("none", "a1", 0, 10), record("none", "a2", 0, 30)]
        found = summarise(records, FACTS)["methods"]["none"]["by_family"]["overall"]
        assert found["decode_tokens_per_s"] == pytest.approx(15)

    def test_differences_are_counted_and_placed(self) -> None:
        records = [record("none", "a", 0, 10), record("fast", "a", 0, 10)]
        records[1]["ids"] = [[5] * 20 + [6] * 12]
        records.append(record("none", "a", 1, 10, ids=[[9] * 32]))  # the first repeat decides
        equal = summarise(records, FACTS)["methods"]["fast"]["by_family"]["a"]["equal"]
        assert (equal["same"], equal["compared"]) == (0, 1)
        assert equal["different"][0]["at"] == 20
        own = summarise(records, FACTS)["methods"]["none"]["by_family"]["a"]["equal"]
        assert (own["same"], own["compared"]) == (1, 2)

    def test_the_stop_id_may_be_returned_or_not(self) -> None:
        records = [record("none", "a", 0, 10), record("peer/plain", "a", 0, 10)]
        records[0]["ids"], records[1]["ids"] = [[5, 5, 2]], [[5, 5]]
        methods = summarise(records, FACTS, stops=[2])["methods"]
        assert methods["peer/plain"]["by_family"]["a"]["equal"]["same"] == 1
        assert count_tokens([[5, 5, 2]], [2], 10) == count_tokens([[5, 5]], [2], 10) == 3
        assert count_tokens([[5, 5]], [2], 2) == 2
        assert stop_ids([2, 5], [2]) == []

    def test_sampled_peers_are_not_compared(self) -> None:
        records = [record("none", "a", 0, 10), record("peer/plain", "a", 0, 10)]
        methods = summarise(records, FACTS, compare_ids=False)["methods"]
        assert methods["peer/plain"]["by_family"]["a"]["equal"] is None
        assert methods["none"]["by_family"]["a"]["equal"]["same"] == 1

    def test_acceptance(self) -> None:
        # 10 steps: 4 accepted nothing, 3 one draft, 3 two; three drafted each time
        found = acceptance(
            [{"steps": 10, "drafted": 30, "histogram": [4, 3, 3], "per_position": [6, 3]}]
        )
        assert found["acceptance_length"] == pytest.approx(1.9)
        assert found["accepted_by_position"] == [0.6, 0.3]
        assert found["accepted_given_previous"] == [0.6, 0.5]
        assert found["acceptance_rate"] == pytest.approx(0.3)
        assert acceptance([{"steps": None}])["acceptance_length"] is None

    def test_failures_are_counted_and_leave_no_speed(self) -> None:
        records = [record("none", "a", 0, 10)]
        records.append({"method": "fast", "key": "a", "family": "a", "repeat": 0, "error": "no"})
        found = summarise(records, FACTS)["methods"]["fast"]
        assert found["failed"] == 1
        assert "by_family" not in found

    def test_no_speed_without_tokens_after_the_first_step(self) -> None:
        assert decode_speed(record("none", "a", 0, 10, tokens=1)) is None
        assert decode_speed(record("none", "a", 0, 10, first_s=None)) is None


SOURCE: dict[str, Any] = {
    "command": "foretell bench",
    "settings": {"dtype": "float32", "threads": 1, "batch": 1, "temperature": 0.0, "seed": 0,
                 "max_tokens": 32, "ignore_eos": False, "repeats": 3},
    "machine": {"cpu": "c", "usable_cores": 2, "flags": ["avx2"], "memory_bytes": 1 << 33},
    "model": {"name": "m", "sha256": "0" * 64, "widened_from": None},
    "workloads": [{"name": "w", "prompts": 12, "sha256": "1" * 64}],
    "warnings": ["a <busy> machine"],
}  # fmt: skip


class TestReports:
    @pytest.fixture
    def summary(self) -> dict[str, Any]:
        records = run_of({"none": 10.0, "fast": 25.0, "peer/plain": 5.0}, 0.02, 0)
        for r in records:
            if r["method"] == "fast":
                r |= {"steps": 16, "histogram": [4, 8, 4], "per_position": [12, 4], "drafted": 48}
        found = summarise(records, FACTS)
        return found | {"forward_curve": {"context": 9, "rows": [1, 2, 4], "ms": [1.0, 1.1, 1.5]}}

    def test_the_page_asks_nobody_for_anything(self, summary: dict[str, Any]) -> None:
        page = report.page(summary, SOURCE)
        assert page.count("<svg") == 4
        for word in ("<script", "<link", "<img", "url(", "@import", "src="):
            assert word not in page
        assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 0
        assert "a &lt;busy&gt; machine" in page
        assert "LOSSY" in page

    def test_widened_models_are_labelled_everywhere(self, summary: dict[str, Any]) -> None:
        source = SOURCE | {"model": SOURCE["model"] | {"widened_from": {"sha256": "2"}}}
        for text in (report.page(summary, source), report.markdown(summary, source),
                     report.terminal(summary, source)):  # fmt: skip
            assert "WIDENED" in text
        assert "WIDENED" not in report.terminal(summary, SOURCE)

    def test_tables(self, summary: dict[str, Any]) -> None:
        text = report.terminal(summary, SOURCE)
        assert "none (plain decoding)" in text
        assert "60/60" in text
        assert "times as fast as" in text
        lines = report.markdown(summary, SOURCE).splitlines()
        row = next(t for t in lines if t.startswith("| fast"))
        assert row.split("|")[3].strip().startswith("2.5")

    def test_bars_are_as_high_as_their_values(self) -> None:
        chart = figures.Chart("n", "t", "bars", ["x"], {"one": [1.0], "two": [2.0]}, line=1.0)
        drawn = svg(chart)
        heights = [float(p.split('"')[0]) for p in drawn.split('" height="')[1:]][:2]
        assert heights[1] == pytest.approx(2 * heights[0], rel=1e-3)

    @pytest.mark.parametrize("top", [1e-9, 0.013, 0.5, 1.0, 3.7, 99.0, 12345.0])
    def test_ticks_reach_the_top(self, top: float) -> None:
        marks = figures.ticks(top)
        assert marks[0] == 0
        assert marks[-1] >= top * (1 - 1e-9)
        assert 3 <= len(marks) <= 7

    def test_png(self, summary: dict[str, Any], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        from foretell.lab.bench import png

        for chart in figures.charts(summary):
            png.draw(chart, tmp_path / f"{chart.name}.png")
        assert {p.name for p in tmp_path.iterdir()} == {
            "speedup.png", "acceptance.png", "accepted.png", "forward.png",
        }  # fmt: skip


class TestCompare:
    def run(self, name: str, records: list[Any], **settings: Any) -> Run:
        source = {"settings": settings, "stop_ids": []}
        return Run(Path(name), source, records)

    def test_noise_is_no_difference(self) -> None:
        false = 0
        for seed in range(40):
            a = self.run("a", run_of({"none": 10, "fast": 20}, 0.03, seed))
            b = self.run("b", run_of({"none": 10, "fast": 20}, 0.03, 1000 + seed))
            false += compare(a, b, smallest=0.0).differs
        assert false <= 4

    def test_a_difference_is_found(self) -> None:
        for seed in range(10):
            a = self.run("a", run_of({"none": 10, "fast": 20}, 0.03, seed))
            b = self.run("b", run_of({"none": 10, "fast": 18}, 0.03, 1000 + seed))
            none, fast = compare(a, b).differences
            assert fast.differs
            assert fast.ratio == pytest.approx(0.9, abs=0.03)
            assert "slower" in fast.sentence()
            assert not none.differs

    def test_small_differences_do_not_matter(self) -> None:
        a = self.run("a", run_of({"none": 10}, 0.0, 0))
        b = self.run("b", run_of({"none": 10.1}, 0.0, 0))
        assert not compare(a, b).differs
        assert compare(a, b, smallest=0.005).differs

    def test_drift_between_passes_widens_the_interval(self) -> None:
        """All prompts of a pass are slow together: prompts alone would say the runs differ."""

        def drifting(name: str, passes: list[float]) -> Run:
            return self.run(name, [record("none", f"a{i}", r, 10 * f) for i in range(20)
                                   for r, f in enumerate(passes)])  # fmt: skip

        found = compare(drifting("a", [1, 0.9, 1.1]), drifting("b", [1.08, 1.0, 1.15]))
        assert not found.differs
        assert found.differences[0].noise is not None

    def test_relative_forgives_a_slower_machine(self) -> None:
        a = self.run("a", run_of({"none": 10, "fast": 20}, 0.0, 0))
        b = self.run("b", run_of({"none": 5, "fast": 10}, 0.0, 0))
        assert compare(a, b).differs
        found = compare(a, b, relative=True)
        assert [d.method for d in found.differences] == ["fast"]
        assert not found.differs

    def test_one_repeat_knows_no_drift(self) -> None:
        a, b = (self.run(n, run_of({"none": 10}, 0.01, i, 1)) for i, n in enumerate("ab"))
        assert "unknown" in compare(a, b).differences[0].sentence()

    def test_changed_text_is_told(self) -> None:
        a, b = (self.run(n, run_of({"none": 10}, 0.0, 0)) for n in "ab")
        for r in b.records:
            r["ids"] = [[6]] if r["key"] == "a0" else r["ids"]
        assert compare(a, b).differences[0].changed == 1

    def test_different_settings_are_told(self) -> None:
        a = self.run("a", run_of({"none": 10}, 0.0, 0), threads=1)
        b = self.run("b", run_of({"none": 10, "new": 9}, 0.0, 0), threads=2)
        text = " ".join(compare(a, b).notes)
        assert "threads: 1 and 2" in text
        assert "new" in text

    def test_nothing_in_common(self) -> None:
        a = self.run("a", run_of({"x": 10}, 0.0, 0))
        b = self.run("b", run_of({"y": 10}, 0.0, 0))
        with pytest.raises(InputError, match="share no method"):
            compare(a, b)
        with pytest.raises(InputError, match="plain decoding"):
            compare(a, a, relative=True)

    def test_records_are_read_up_to_a_cut(self, tmp_path: Path) -> None:
        whole = json.dumps(record("none", "a", 0, 1))
        assert len(read_records([whole, whole[:30]], tmp_path)) == 1
        with pytest.raises(InputError, match="Line 1"):
            read_records([whole[:30], whole], tmp_path)
        with pytest.raises(InputError, match="no run"):
            Run.read(tmp_path)


class TestFolder:
    def test_resume_keeps_whole_records_only(self, tmp_path: Path) -> None:
        whole = json.dumps(record("none", "a", 0, 1))
        path = tmp_path / "records.jsonl"
        path.write_text(whole + "\n" + whole[:40])
        with pytest.raises(InputError, match="--resume"):
            folder.open_run(tmp_path, False)
        assert len(folder.open_run(tmp_path, True)) == 1
        assert path.read_text() == whole + "\n"

    def test_another_run_is_not_resumed(self, tmp_path: Path) -> None:
        source = {"settings": {"batch": 1}, "workloads": [], "model": {}}
        folder.write_json(tmp_path / "provenance.json", source)
        folder.same_run(tmp_path, source, True)
        with pytest.raises(InputError, match="batch"):
            folder.same_run(tmp_path, source | {"settings": {"batch": 2}}, True)
        folder.same_run(tmp_path, source | {"settings": {"batch": 2}}, False)


def test_a_model_is_described_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"foretell": {"widened_from": {"sha256": "a"}}}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = provenance.describe_model(tmp_path)
    assert found["widened_from"] == {"sha256": "a"}
    assert found["weight_bytes"] == 7
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    assert provenance.describe_model(tmp_path)["sha256"] != found["sha256"]
    (tmp_path / "config.json").write_text("{}")
    assert provenance.describe_model(tmp_path)["widened_from"] is None


class TestMachine:
    def test_energy_counts_on_after_a_wrap(self, tmp_path: Path) -> None:
        zone = tmp_path / "intel-rapl:0"
        zone.mkdir()
        (zone / "name").write_text("package-0\n")
        (zone / "max_energy_range_uj").write_text("999999\n")
        (zone / "energy_uj").write_text("900000\n")
        energy = machine.Energy(tmp_path)
        before = energy.read()
        (zone / "energy_uj").write_text("100000\n")
        assert energy.joules(before, energy.read()) == pytest.approx(0.2)
        assert machine.Energy(tmp_path / "none").read() is None

    def test_shares_of_others(self) -> None:
        before, after = machine.Ticks(100, 100, 0, 50), machine.Ticks(160, 120, 20, 80)
        assert after.since(before) == {"other": 0.3, "steal": 0.2}
        assert before.since(before) == {"other": 0.0, "steal": 0.0}

    def test_own_work_is_not_others(self) -> None:
        before = machine.Ticks.now()
        if before is None:
            pytest.skip("no /proc/stat")
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        after = machine.Ticks.now()
        assert after is not None
        assert after.ours - before.ours >= 20


ADAPTER = """
import os, time
class System:
    def load(self, config):
        print("noise on standard output")
        return {"pid": os.getpid(), "package": __import__("foretell").__file__}
    def spin(self):
        import threading
        def work():
            while True: pass
        threading.Thread(target=work, daemon=True).start()
    def die(self):
        import sys
        print("last words", file=sys.stderr); sys.stderr.flush(); os._exit(3)
    def bad(self):
        raise KeyError("a reason")
    def big(self, n):
        return "x" * n
    def _hidden(self):
        return 1
"""


def cpu_seconds(pid: int) -> float:
    tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(tail[11]) + int(tail[12])) / os.sysconf("SC_CLK_TCK")


class TestWorker:
    @pytest.fixture
    def worker(self, tmp_path: Path):
        path = tmp_path / "adapter.py"
        path.write_text(ADAPTER)
        with Worker("w", path) as worker:
            yield worker

    def test_answers_and_errors(self, worker: Worker) -> None:
        facts = worker.ask("load", config={})
        assert facts["pid"] == worker.pid
        assert Path(facts["package"]).parts[-2:] == ("foretell", "__init__.py")
        assert worker.ask("fresh") is None  # optional parts may be missing
        assert worker.ask("_hidden") is None
        with pytest.raises(WorkerFailed, match="a reason") as failed:
            worker.ask("bad")
        assert failed.value.kind == "KeyError"
        assert not failed.value.dead
        assert worker.ask("memory")["peak"] > 1 << 20
        assert worker.ask("big", n=1_000_000) == "x" * 1_000_000  # more than a pipe holds

    def test_its_last_words_are_told(self, worker: Worker) -> None:
        with pytest.raises(WorkerFailed, match="last words") as failed:
            worker.ask("die")
        assert failed.value.dead
        with pytest.raises(WorkerFailed) as failed:
            worker.ask("load", config={})
        assert failed.value.dead

    def test_it_does_not_run_between_questions(self, worker: Worker) -> None:
        worker.ask("spin")
        before = cpu_seconds(worker.pid)
        time.sleep(0.3)
        assert cpu_seconds(worker.pid) - before <= 0.02
        assert worker.ask("memory")

    def test_it_gives_up_in_time(self, tmp_path: Path) -> None:
        path = tmp_path / "slow.py"
        path.write_text("import time\nclass System:\n    def wait(self): time.sleep(60)\n")
        with Worker("slow", path, timeout=0.5) as worker:
            with pytest.raises(WorkerFailed, match="no answer"):
                worker.ask("wait")
            assert worker.process.returncode == -signal.SIGKILL

    def test_a_missing_interpreter_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(WorkerFailed, match="cannot be started"):
            Worker("w", tmp_path / "a.py", python=str(tmp_path / "python"))


def test_steps_of_a_batch() -> None:
    steps = Steps(2)
    for n, sequence in ((3, 0), (1, 0), (2, 1), (1, 1)):
        steps.add(n, sequence)
    steps.stop()
    found = steps.result([[1] * 4, [1] * 3])
    assert found["first_tokens"] == 6  # out when the second sequence had its first one
    assert found["histogram"] == [2, 1, 1]
    assert found["per_position"] == [2, 1]
    assert found["steps"] == 4
    assert 0 <= found["ttft_s"] <= found["first_s"] <= found["seconds"]


class TestExports:
    PYTHON = """#!{python}
import sys
from pathlib import Path
_, flag, code, root, folder, out, dtype = sys.argv
if "fail" in folder: sys.exit("foretell.core.errors.InputError: it cannot be.")
Path(out).write_text(dtype)
"""

    def test_files_are_made_once_by_the_peers_python(self, tmp_path: Path) -> None:
        import sys

        python = tmp_path / "python"
        python.write_text(self.PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        model = tmp_path / "model"
        model.mkdir()
        (model / "model.safetensors").write_bytes(b"1")
        told: list[str] = []
        first = peer_files(
            "llamacpp", model, None, "int8-g32", str(python), tmp_path / "c", told.append
        )
        again = peer_files(
            "llamacpp", model, None, "int8", str(python), tmp_path / "c", told.append
        )
        assert first == again
        assert len(told) == 1
        assert Path(first["file"]).read_text() == first["file_dtype"] == "q8_0"
        (model / "model.safetensors").write_bytes(b"2")
        other = peer_files("llamacpp", model, None, "int8", str(python), tmp_path / "c")
        assert other["file"] != first["file"]
        with pytest.raises(InputError, match="no gguf counterpart"):
            peer_files("llamacpp", model, None, "fp3", str(python), tmp_path)
        bad = tmp_path / "fail"
        bad.mkdir()
        with pytest.raises(InputError, match="it cannot be"):
            peer_files("openvino", bad, None, "int8", str(python), tmp_path / "c")
        assert peer_files("transformers", bad, None, "int8", str(python), tmp_path) == {}

    def test_every_class_has_a_counterpart(self) -> None:
        assert GGUF.keys() == OPENVINO.keys() == {
            "float32", "bfloat16", "float16", "int8", "int4",
        }  # fmt: skip


def test_medians_agree_with_the_standard_library() -> None:
    records = [record("none", "a", r, s) for r, s in enumerate((7.0, 9.0, 8.0, 30.0))]
    found = summarise(records, FACTS)["methods"]["none"]["by_family"]["a"]
    assert found["decode_tokens_per_s"] == pytest.approx(statistics.median((7, 9, 8, 30)))


def test_a_new_pass_has_new_drafters() -> None:
    from foretell.lab.bench.workers.own import System

    system = System()
    system.ready = {"method": object()}  # type: ignore[dict-item]
    system.fresh()
    assert not system.ready
