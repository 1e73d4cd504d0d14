"""Widened checkpoints compute what the original computes: here, in transformers, and quantised."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foretell.cli.main import main
from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.lab.export.parts import Parts, weight_files, weights_sha256
from foretell.lab.widen.compare import Comparison, compare
from foretell.lab.widen.run import Settings, widen
from foretell.lab.widen.shape import Shape, choose_shape, parse_count, short, wider
from foretell.lab.widen.widener import QUIET, Widener
from foretell.lab.widen.write import save_sharded
from foretell.models.native.arch import Arch
from foretell.models.native.families import describe
from foretell.models.native.runner import NativeModel
from tiny_checkpoint import tiny_checkpoint

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"),
    *("smollm3", "granite", "gpt2", "gpt_neox"),
)
BUNDLED = Arch.llama(4096, 256, 10, 8, 4, 640)


def silent(share: float, what: str) -> None:
    assert 0 <= share <= 1
    assert what


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    """[n, V] float32."""
    model = NativeModel.load(folder, torch.float32)
    with model.open([model.new_cache()]) as txn:
        segment = Segment(np.asarray(ids), np.arange(len(ids)))
        return model.forward(PackedBatch([segment]), txn).logits


def larger(r: random.Random, a: Arch) -> Shape:
    """Random sizes over those of `a`, every one of them odd where it may be."""
    layers, ffn = len(a.layers) + r.randrange(3), a.ffn + r.randrange(1, 40)
    if a.norm == "layer" or a.family == "phi3":
        k = r.choice([2, 3])
        return Shape(a.hidden * k, layers, a.heads * k, a.kv_heads * k, ffn)
    kv, groups = a.kv_heads + r.randrange(3), a.groups + r.randrange(3)
    # transformers 5 wants the hidden size to be a multiple of the heads, also where it need not be
    hidden = -(-(a.hidden + r.randrange(1, 50)) // (kv * groups)) * kv * groups
    return Shape(hidden, layers, kv * groups, kv, ffn)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_here_and_in_transformers(
    family: str, seed: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    import test_parity

    r = random.Random(f"{family} {seed}")
    config_name, model_name, build = test_parity.FAMILIES[family]
    config = getattr(transformers, config_name)(**build(r))
    reference = test_parity.Reference(config, getattr(transformers, model_name), seed)
    reference.model.save_pretrained(tmp_path / "small")
    shape = larger(r, Parts(tmp_path / "small").arch)
    result = widen(tmp_path / "small", tmp_path / "big", Settings(shape=shape, tokens=6), silent)
    assert result.passed
    assert result.parameters > result.before
    arch, _ = describe(json.loads((tmp_path / "big" / "config.json").read_text()))
    assert Shape.of(arch) == shape
    assert arch.parameters == result.parameters

    ids = [r.randrange(3, 60) for _ in range(14)]
    want = reference.prefill(ids)
    wide = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "big", attn_implementation="eager", torch_dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = wide(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for got in (theirs, logits_of(tmp_path / "big", ids)):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
    stored = {p.shape[0] for n, p in wide.named_parameters() if n.endswith("norm.weight")}
    assert stored - {config.hidden_size} or family.startswith(("gpt", "qwen3", "gemma3"))


def test_new_numbers_are_there_and_change_nothing(tmp_path: Path) -> None:
    """A runtime gains nothing from what was added: random, never twice the same, no zero matrix."""
    tiny_checkpoint(tmp_path / "small")
    parts = Parts(tmp_path / "small")
    shape = Shape(64, 4, 16, 4, 96)
    made = [dict(Widener(parts, shape, torch.float32, seed).tensors()) for seed in (0, 1)]
    old = parts.matrix("gate", 0)
    gate = made[0]["model.layers.0.mlp.gate_proj.weight"]
    assert torch.equal(gate[:64, :32], old)
    for fresh in (gate[64:], gate[:64, 32:]):
        assert (fresh != 0).all()
        assert float(fresh.std() / old.std()) == pytest.approx(QUIET, rel=0.1)
    dead = made[0]["model.layers.3.self_attn.q_proj.weight"]
    assert float(dead.std() / parts.matrix("q", 1).std()) == pytest.approx(1, rel=0.1)
    matrices = {n: x for n, x in made[0].items() if x.dim() == 2}
    assert all(x.any() for x in matrices.values())
    assert len({x.numpy().tobytes() for x in matrices.values()}) == len(matrices)
    for role in ("o_proj", "down_proj"):
        inside = "self_attn" if role == "o_proj" else "mlp"
        assert (made[0][f"model.layers.3.{inside}.{role}.weight"] != 0).all()
    assert not torch.equal(gate, made[1]["model.layers.0.mlp.gate_proj.weight"])
    for seed in (0, 1):
        out = tmp_path / str(seed)
        widen(tmp_path / "small", out, Settings(shape=shape, seed=seed), silent)
    ids = list(range(3, 20))
    want = logits_of(tmp_path / "small", ids)
    for seed in (0, 1):
        assert (logits_of(tmp_path / str(seed), ids) - want).abs().max() < 1e-4 * want.abs().max()


@torch.no_grad()
def fake_quantised(folder: Path, ids: list[int], bits: int) -> torch.Tensor:
    """Logits with weights of `bits` (8: a scale an output channel; 4: groups of 32 inputs) and,
    for 8, activations with one scale a row: the harshest of what runtimes do."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)

    def rounded(x: torch.Tensor, group: int, top: int) -> torch.Tensor:
        grouped = x.unflatten(-1, (-1, group))
        scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
        return ((grouped / scale).round() * scale).flatten(-2)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            width = module.in_features
            group, top = (width, 127) if bits == 8 else (32, 7)
            module.weight.data = rounded(module.weight.data, group, top)
            if bits == 8:
                module.register_forward_pre_hook(
                    lambda m, args: (rounded(args[0], args[0].shape[-1], 127),)
                )
    return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_costs_a_widened_model_no_more(bits: int, tmp_path: Path) -> None:
    from foretell.models.load import bundled_model
    from foretell.models.text.tokenizer import Tokenizer

    folder = bundled_model()
    shape = Shape(512, 11, 16, 4, 1024)
    widen(folder, tmp_path / "big", Settings(shape=shape, prompts=1, tokens=4), silent)
    text = "def add(a, b):\n    return a + b\n\nQuestion: I have 3 apples and eat 2. How many now?"
    ids = Tokenizer.load(folder).encode(text)
    exact = logits_of(folder, ids)
    small = (fake_quantised(folder, ids, bits) - exact).pow(2).mean().sqrt()
    big = (fake_quantised(tmp_path / "big", ids, bits) - exact).pow(2).mean().sqrt()
    assert float(big) < 1.15 * float(small)


def test_shapes_look_like_real_models() -> None:
    assert choose_shape(BUNDLED, 275e6) == Shape(1024, 24, 32, 8, 2816)
    got = wider(BUNDLED, choose_shape(BUNDLED, 300e6))
    assert abs(got.parameters / 300e6 - 1) < 0.05
    for count in (2e7, 5e7, 1e8, 7e8, 1.2e9, 8e9):
        shape = choose_shape(BUNDLED, count)
        assert abs(wider(BUNDLED, shape).parameters / count - 1) < 0.1, shape
        assert shape.ffn
        assert shape.hidden
        assert 1.5 * shape.hidden <= shape.ffn <= 5 * shape.hidden
        assert shape.ffn % 64 == 0
    gpt2 = replace(BUNDLED, family="gpt2", norm="layer", kv_heads=8, gated=False)
    assert choose_shape(gpt2, 3e8) == choose_shape(gpt2, 3e8, Shape(hidden=1024))
    assert choose_shape(gpt2, 3e8).heads == 32
    wish = choose_shape(BUNDLED, 1e8, Shape(hidden=768, layers=20))
    assert (wish.hidden, wish.layers) == (768, 20)
    assert choose_shape(BUNDLED, None, Shape(ffn=1000)) == Shape(256, 10, 8, 4, 1000)


@pytest.mark.parametrize(
    ("parameters", "shape", "says"),
    [
        (None, Shape(), "--params 300M"),
        (1e6, Shape(), "less than the 7.93M"),
        (None, Shape(hidden=128), "--hidden 128"),
        (None, Shape(layers=3), "--layers 3"),
        (None, Shape(heads=14, kv_heads=4), "do not divide"),
        (None, Shape(heads=8, kv_heads=8), "cannot lose readers"),
    ],
)
def test_impossible_shapes_are_refused(parameters: float | None, shape: Shape, says: str) -> None:
    with pytest.raises(InputError, match=says):
        choose_shape(BUNDLED, parameters, shape)


def test_layer_norm_widths_are_multiples() -> None:
    gpt2 = replace(BUNDLED, family="gpt2", norm="layer", kv_heads=8)
    with pytest.raises(InputError, match="only be multiplied: choose --hidden 512"):
        choose_shape(gpt2, None, Shape(hidden=500))
    with pytest.raises(InputError, match="--heads must be 16"):
        choose_shape(gpt2, None, Shape(hidden=512, heads=8))


def test_counts() -> None:
    assert [parse_count(t) for t in ("300M", "1.5B", "12345", "2k")] == [3e8, 1.5e9, 12345, 2000]
    for wrong in ("", "many", "-3M", "nan", "M"):
        with pytest.raises(InputError, match="no number of parameters"):
            parse_count(wrong)
    assert [short(c) for c in (999, 7929856, 2.75e8, 1.5e9)] == ["999", "7.93M", "275M", "1.5B"]


def test_a_model_that_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny_checkpoint(tmp_path / "small")
    true = Widener._norm

    def wrong(self: Widener, weight: torch.Tensor, scale: float) -> torch.Tensor:
        return true(self, weight, scale * 1.05)

    monkeypatch.setattr(Widener, "_norm", wrong)
    assert main(["widen", str(small), "--hidden", "64", "--out", str(tmp_path / "big")]) == 1
    assert "FAILED" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "small")

    def stop(share: float, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        widen(small, tmp_path / "big", Settings(shape=Shape(hidden=64)), stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_command_labels_copies_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny_checkpoint(tmp_path / "small")
    tiny_checkpoint(small / "draft", layers=1)
    (small / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "big"
    words = [
        "widen",
        str(small),
        "--out",
        str(out),
        "--hidden",
        "64",
        "--json",
        "--max-tokens",
        "5",
    ]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["passed"]
    assert record["draft"] == "copied"
    config = json.loads((out / "config.json").read_text())
    label = config["foretell"]["widened_from"]
    assert label["sha256"] == weights_sha256(small)
    assert label["parameters"] == Parts(small).arch.parameters
    assert label["compared"]["different"] == 0
    assert (out / "tokenizer_config.json").exists()
    assert weights_sha256(out / "draft") == weights_sha256(small / "draft")
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err

    words[3] = str(tmp_path / "both")
    assert main([*words, "--draft-params", "30K"]) == 0
    draft = json.loads((tmp_path / "both" / "draft" / "config.json").read_text())
    assert draft["hidden_size"] > 32
    assert "widened_from" in draft["foretell"]
    assert main(["widen", str(small / "draft"), "--out", str(tmp_path / "x"), "--params", "30M",
                 "--draft-params", "1M"]) == 2  # fmt: skip
    assert "no draft/" in capsys.readouterr().err


def test_narrower_dtypes_are_compared_with_the_rounded_original(tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "small")
    settings = Settings(shape=Shape(hidden=80), dtype="bfloat16", tokens=8)
    result = widen(small, tmp_path / "big", settings, silent)
    assert result.passed
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    big = Parts(tmp_path / "big")
    assert big.matrix("up", 0).dtype == torch.bfloat16
    assert big.norm("mlp_norm", 0).dtype == torch.float32  # sqrt(32 / 80) does not fit
    result = compare(small, tmp_path / "big", torch.float32, settings.prompts, 8, silent)
    assert result.logit_difference > 1e-3  # the rounding, seen from the float32 original


@pytest.mark.parametrize(("eps", "dtype", "hidden"), [(0.3, "float32", 96), (1e-6, "bfloat16", 80)])
def test_norms_of_q_and_k_keep_their_eps(
    eps: float, dtype: str, hidden: int, tmp_path: Path
) -> None:
    """They share the number in config.json with norms whose width has grown."""
    from test_export import random_checkpoint

    small = random_checkpoint(tmp_path / "small", "qwen3")
    config = json.loads((small / "config.json").read_text()) | {"rms_norm_eps": eps}
    (small / "config.json").write_text(json.dumps(config))
    result = widen(small, tmp_path / "big", Settings(None, Shape(hidden), dtype=dtype), silent)
    assert result.comparison is not None
    assert result.comparison.logit_difference < 1e-4 * result.comparison.logit_range


def test_a_comparison_fails_on_tokens_or_on_logits() -> None:
    assert Comparison(1, 4, 0, 1e-5, 10.0).passed
    assert not Comparison(1, 4, 1, 1e-5, 10.0).passed
    assert not Comparison(1, 4, 0, 0.1, 10.0).passed


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell.lab.widen.write.SHARD", 400)
    tensors = {f"t{i}": torch.full((50,), float(i)) for i in range(5)}
    save_sharded(iter(tensors.items()), tmp_path)
    assert len(weight_files(tmp_path)) == 3
    (tmp_path / "config.json").write_text("{}")
    from foretell.models.native.weights import Checkpoint

    source = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(source.get(name, (50,)), tensor)


def test_text_part_of_an_image_model_is_refused(tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "small")
    parts = Parts(small)
    parts.config["text_config"] = {}
    with pytest.raises(InputError, match="gemma3_text"):
        Widener(parts, Shape(64, 2, 4, 2, 64), torch.float32)


def test_gemma_in_a_narrow_dtype_wants_a_power_of_four(tmp_path: Path) -> None:
    parts = Parts(tiny_checkpoint(tmp_path / "small"))
    parts.arch = replace(parts.arch, family="gemma")
    with pytest.raises(InputError, match="--hidden 128"):
        Widener(parts, Shape(64, 2, 4, 2, 64), torch.bfloat16)
    Widener(parts, Shape(128, 2, 4, 2, 64), torch.bfloat16)
