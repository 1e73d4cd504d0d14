"""Exported models compute what ours compute: in llama.cpp, in OpenVINO, tensor by tensor."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foretell.cli.main import main
from foretell.core.batch import PackedBatch, Segment
from foretell.core.errors import InputError
from foretell.lab.export import gguf as writer
from foretell.lab.export import openvino as ir
from foretell.lab.export.gguf_tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
    word_rule,
)
from foretell.lab.export.openvino_graph import check
from foretell.lab.export.parts import Parts, matrix_shapes
from foretell.models.native.families import FAMILIES, describe
from foretell.models.native.runner import NativeModel
from foretell.models.native.weights import RandomSource
from foretell.models.text.tokenizer import Tokenizer
from tiny_checkpoint import byte_tokenizer, tiny_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
CONFIGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama, scaled": {"rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"sliding_window": 64},
    "gemma3_text": GEMMA | {"sliding_window": 64, "num_hidden_layers": 7},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 5.0,
    },
    "smollm3": {"num_hidden_layers": 4},
    "phi3": {"partial_rotary_factor": 0.5},
}
GGUF = (
    "llama|llama, scaled|llama, linear|mistral|qwen2|qwen3|gemma|gemma2|gemma3_text|olmo2|granite"
)
OPENVINO = (
    "llama|llama, scaled|llama, linear|llama, yarn|mistral|qwen2|qwen3|gemma|olmo2|granite|smollm3"
    "|phi3"
)
IDS = [random.Random(1).randrange(3, 290) for _ in range(23)]


class Recorder(RandomSource):
    """Random tensors, kept, so that they can be written to a file."""

    def __init__(self) -> None:
        super().__init__(seed=3, gain=1.5)
        self.tensors: dict[str, torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        x = super().get(name, shape)
        self.tensors[name] = x.contiguous()
        return x


def random_checkpoint(folder: Path, name: str) -> Path:
    """A checkpoint of a family with random weights."""
    family = name.partition(",")[0]
    config = SIZES | {"model_type": family} | CONFIGS[name]
    arch, names = describe(config)
    source = Recorder()
    NativeModel(arch, names, source, torch.float32)
    folder.mkdir(exist_ok=True)
    save_file(source.tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def our_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = NativeModel.load(folder, torch.float32)
    with model.open([model.new_cache()]) as txn:
        segment = Segment(np.asarray(ids), np.arange(len(ids)))
        return model.forward(PackedBatch([segment]), txn).logits


# -- llama.cpp


@pytest.mark.parametrize("name", GGUF.split("|"))
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = random_checkpoint(tmp_path / "m", name)
    byte_tokenizer(folder)
    out = writer.export_gguf(folder, tmp_path / "m.gguf", "f32")
    model = llama_cpp.Llama(str(out), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    model.eval(IDS)
    got = torch.from_numpy(np.array(model.scores[: len(IDS)]))
    want = our_logits(folder, IDS)
    assert (got - want).abs().max() < 5e-3 * want.abs().max()  # llama.cpp's cache is float16
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("dtype", ["q8_0", "q4_K_M"])
def test_llama_cpp_runs_quantised_files(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    from foretell.models.load import bundled_model

    folder = bundled_model()
    out = writer.export_gguf(folder, tmp_path / "m.gguf", dtype)
    assert out.stat().st_size < 0.6 * (folder / "model.safetensors").stat().st_size
    model = llama_cpp.Llama(str(out), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    text = "def add(a, b):\n    return a + b\n\nIt's 12 o'clock"
    ids = Tokenizer.load(folder).encode(text)
    assert model.tokenize(text.encode(), add_bos=False) == ids
    model.eval(ids)
    got = torch.from_numpy(np.array(model.scores[: len(ids)]))
    want = our_logits(folder, ids)
    limit = {"q8_0": 0.03, "q4_K_M": 0.25}[dtype]
    assert (got - want).pow(2).mean().sqrt() < limit * want.std()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_gguf_holds_the_tensors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder = tiny_checkpoint(tmp_path / "m", tied=False)
    out = writer.export_gguf(folder, tmp_path / "m.gguf", "bf16")
    reader = gguf.GGUFReader(out)
    found = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    parts = Parts(folder)
    assert torch.equal(found["blk.1.ffn_up.weight"], parts.matrix("up", 1).bfloat16().float())
    assert torch.equal(found["output.weight"], _head(parts).bfloat16().float())
    assert torch.equal(found["blk.0.attn_norm.weight"], parts.norm("attn_norm", 0))
    # llama turns rows 2d and 2d + 1 where Hugging Face turns d and d + D / 2
    q = parts.matrix("q", 0).bfloat16().float()
    assert torch.equal(found["blk.0.attn_q.weight"][:8:2], q[:4])
    assert torch.equal(found["blk.0.attn_q.weight"][1:8:2], q[4:8])
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"


def _head(parts: Parts) -> torch.Tensor:
    head = parts.head()
    assert head is not None
    return head


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("phi3", {}, "phi3 cannot be written as GGUF"),
        ("llama", CONFIGS["llama, yarn"], "kind 'yarn'|kind yarn"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "scales this family's scores"),
        ("gemma3_text", GEMMA | {"rope_local_base_freq": 50.0}, "built in"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, more: dict, says: str, tmp_path: Path
) -> None:
    config = SIZES | {"model_type": family} | more
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = Parts(tmp_path, RandomSource())
    with pytest.raises(InputError, match=says):
        writer.check(parts)


# -- the tokenizer section


def test_vocabulary_of_the_bundled_model() -> None:
    from foretell.models.load import bundled_model

    v = read_vocabulary(bundled_model(), 4100)
    assert (v.kind, v.pre, v.add_bos) == ("gpt2", "qwen2", False)
    assert len(v.tokens) == len(v.types) == 4100
    assert v.tokens[2] == "<|im_end|>"
    assert v.types[2] == CONTROL
    assert v.types[300] == NORMAL
    assert v.types[4099] == UNUSED
    assert v.ids == {"bos": 0, "eos": 0, "pad": 0, "eot": 2}
    assert all(m.count(" ") == 1 for m in v.merges)
    assert v.template


def test_sentencepiece_vocabularies_get_scores_and_bytes(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "ab", "▁ab"]
    vocab = {p: i for i, p in enumerate(pieces)}
    model = models.BPE(
        vocab, [("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    v = read_vocabulary(tmp_path, 10)
    assert v.kind == "llama"
    assert v.add_space
    assert v.types[3] == BYTE
    assert v.types[1] == CONTROL
    assert v.types[9] == USER_DEFINED
    assert v.scores[7] > v.scores[8]
    assert not v.merges


def test_no_tokenizer_is_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path, 61).kind == "no_vocab"


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        (r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s]+", "llama-bpe"),
        (r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s]+", "qwen2"),
        (r"[a-z]+", "default"),
    ],
)
def test_word_rules(pattern: str, rule: str) -> None:
    level = {"type": "ByteLevel", "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    assert word_rule({"type": "Sequence", "pretokenizers": [split, level]}) == rule
    assert word_rule({"type": "ByteLevel", "use_regex": True}) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    assert word_rule({"type": "Sequence", "pretokenizers": [digits, level]}) == "smollm"
    assert word_rule(None) == "default"


# -- OpenVINO


@pytest.mark.parametrize("name", OPENVINO.split("|"))
def test_openvino_computes_the_same(name: str, tmp_path: Path) -> None:
    """The prompt in one call, then rows one by one and two at a time, through the state."""
    ov = pytest.importorskip("openvino")
    folder = random_checkpoint(tmp_path / "m", name)
    out = ir.export_openvino(folder, tmp_path / "ir", "f32")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = ov.Core().read_model(out / "openvino_model.xml")
    request = ov.Core().compile_model(model, "CPU", exact).create_infer_request()
    got, at = [], 0
    for n in (12, 1, 1, 2, 7):
        feed = {
            "input_ids": np.asarray([IDS[at : at + n]], np.int64),
            "attention_mask": np.ones((1, at + n), np.int64),
            "position_ids": np.arange(at, at + n, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        got.append(torch.from_numpy(np.array(request.infer(feed)["logits"][0])))
        at += n
    want = our_logits(folder, IDS)
    assert (torch.cat(got) - want).abs().max() < 1e-3 * want.abs().max()


def test_openvino_can_page_the_attention(tmp_path: Path) -> None:
    """What prompt lookup and draft models in OpenVINO GenAI run on."""
    ov = pytest.importorskip("openvino")
    from openvino._offline_transformations import paged_attention_transformation

    folder = tiny_checkpoint(tmp_path / "m")
    out = ir.export_openvino(folder, tmp_path / "ir", "f32")
    model = ov.Core().read_model(out / "openvino_model.xml")
    paged_attention_transformation(model)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count("PagedAttentionExtension") == 2
    assert "ReadValue" not in kinds
    assert model.input("input_ids").get_partial_shape().rank.get_length() == 1
    assert model.output("logits").get_partial_shape().rank.get_length() == 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "int8", "int4"])
def test_genai_runs_all_three_modes(dtype: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai")
    if dtype != "f16":
        pytest.importorskip("nncf")
    from foretell.models.load import bundled_model

    folder = bundled_model()
    main_ = str(ir.export_openvino(folder, tmp_path / "main", dtype))
    draft = str(ir.export_openvino(folder / "draft", tmp_path / "draft", dtype))
    ids = Tokenizer.load(folder).encode("def add(a, b):\n    return a + b\n\ndef sub(a, b):\n")
    model = NativeModel.load(folder, torch.float32)
    from foretell.lab.widen.compare import greedy

    want = greedy(model, ids, 24)
    row = np.asarray([ids], np.int64)
    inputs = genai.TokenizedInputs(genai.openvino.Tensor(row), genai.openvino.Tensor(row * 0 + 1))
    few = {"INFERENCE_NUM_THREADS": 1}
    pipes = [
        (genai.LLMPipeline(main_, "CPU", **few), {}),
        (genai.LLMPipeline(main_, "CPU", prompt_lookup=True, **few), {"max_ngram_size": 3}),
        (genai.LLMPipeline(main_, "CPU", draft_model=genai.draft_model(draft, "CPU"), **few), {}),
    ]
    for i, (pipe, more) in enumerate(pipes):
        options = {"max_new_tokens": 24, "do_sample": False, "ignore_eos": True}
        options |= more | ({"num_assistant_tokens": 3} if i else {})
        got = list(pipe.generate(inputs, genai.GenerationConfig(**options)).tokens[0])
        assert len(got) == 24
        if dtype == "f16":
            assert got == want
        else:
            assert got[:2] == want[:2]


def test_openvino_says_how_far_windows_reach(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder = random_checkpoint(tmp_path / "m", "mistral")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 40}
    (folder / "config.json").write_text(json.dumps(config))
    out = ir.export_openvino(folder, tmp_path / "ir", "f32")
    written = json.loads((out / "config.json").read_text())
    assert written["max_position_embeddings"] == 40


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "gemma3_text"])
def test_families_without_a_graph_are_refused(family: str, tmp_path: Path) -> None:
    more = {"n_embd": 64, "n_head": 4, "n_layer": 2} if family == "gpt2" else {}
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": family} | more))
    with pytest.raises(InputError, match="cannot be written as an OpenVINO model"):
        check(Parts(tmp_path, RandomSource()))


# -- parts and the command


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_have_the_stated_shapes(family: str, tmp_path: Path) -> None:
    gpt2 = {"n_embd": 64, "n_head": 4, "n_layer": 2} if family == "gpt2" else {}
    more = gpt2 | ({"num_key_value_heads": 4} if family == "gpt_neox" else {})
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": family} | more))
    parts = Parts(tmp_path, RandomSource())
    for role, shape in matrix_shapes(parts.arch).items():
        assert tuple(parts.matrix(role, 0).shape) == shape
        bias = parts.bias(role, 0)
        assert bias is None or tuple(bias.shape) == shape[:1]
    assert parts.arch.gated == ("gate" in matrix_shapes(parts.arch))


def test_parts_refuse_quantised_checkpoints(tmp_path: Path) -> None:
    config = SIZES | {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantised"):
        Parts(tmp_path, RandomSource())


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs `foretell export` with some words in an empty folder; what it said when it refused."""
    monkeypatch.chdir(tmp_path)

    def run(words: str) -> str:
        assert main(["export", *words.split()]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--to onnx --out x.onnx", "choose gguf or openvino"),
        ("--to gguf --out nowhere/x.gguf", "there is no directory"),
        ("--to gguf --out . --dtype f16", "name a file such as"),
        ("--to gguf --out x.gguf --dtype int3", "choose f32, f16"),
        ("--to openvino --out x --dtype q8_0", "choose f32, f16, int8"),
    ],
)
def test_wrong_wishes_are_explained(words: str, says: str, refused: Callable[[str], str]) -> None:
    assert says in refused(words)


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("gguf", "--to gguf --out m.gguf", "pip install 'foretell[export]'"),
        ("llama_cpp", "--to gguf --out m.gguf --dtype q4_K_M", "pip install llama-cpp-python"),
        ("openvino", "--to openvino --out m", "pip install 'foretell[export]'"),
        ("nncf", "--to openvino --out m --dtype int8", "nncf|foretell\\[export\\]"),
    ],
)
def test_missing_packages_are_named(
    module: str,
    words: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[str], str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert re.search(says if module == "nncf" else re.escape(says), refused(words))
    assert not list(Path.cwd().iterdir())


def test_command_writes_the_draft_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    small = tiny_checkpoint(tmp_path / "m")
    tiny_checkpoint(small / "draft", layers=1)
    out = tmp_path / "m.gguf"
    assert main(["export", str(small), "--to", "gguf", "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == {
        "to": "gguf",
        "dtype": "f16",
        "model": str(out),
        "draft": str(tmp_path / "m-draft.gguf"),
    }
    assert Path(record["draft"]).stat().st_size < out.stat().st_size
