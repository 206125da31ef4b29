"""export_gguf: what it writes is the model that was measured, by its header; what is not is put right or refused."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from exporting import ROOT, export_python  # noqa: F401 (a fixture)
from gguf_files import FIELDS, TEMPLATE, TOKENS, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from tiny import change_tensors, make_adapter
from tokenizers_for_tests import CHATML, DEMO, make_tokenizer

from moult.errors import MoultError
from moult.exporting.adapter import alpha_of, check_plain
from moult.exporting.calibration import calibration_rows
from moult.exporting.gguf import check_imatrix_programs, find_llama_cpp, gguf_name
from moult.exporting.header import Expected, check_header, ends_generation, problems, read_header
from moult.exporting.ollama import least_distance, template_check, write_modelfile
from moult.exporting.pretokenizer import NAMES, name_of
from moult.files import read_json

EXPECTED = Expected(name="mine", template=TEMPLATE, stops=[2], padding=0, context=512)


def header(tmp_path, changes=None, **more):
    return read_header(write_gguf(tmp_path / "file.gguf", changes, **more))


# --- the header -------------------------------------------------------------------------------------------------------


def test_a_header_is_read_as_it_was_written(tmp_path):
    found = header(tmp_path, {"a.number": 1.5, "a.switch": True, "a.list": [1, -2]})
    assert found.fields == {**FIELDS, "a.number": 1.5, "a.switch": True, "a.list": [1, -2]}
    assert found.tensors["token_embd.weight"][:2] == ("Q8_0", (8, 32))
    first, second = (tensor.begin for tensor in found.tensors.values())
    assert first % 32 == 0 and second - first == 4096
    assert found.types() == {"Q8_0": 1, "F32": 1}


@pytest.mark.parametrize("size", [0, 10, 200, 500])
def test_half_a_file_is_refused(tmp_path, size):
    path = write_gguf(tmp_path / "file.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(MoultError, match="not a whole GGUF file"):
        read_header(path)


def test_the_file_of_the_run_passes(tmp_path):
    assert problems(header(tmp_path), EXPECTED) == []


GATES = {
    "name": ({"general.name": "Merged"}, {"general.name": "mine"}),
    "eos": ({"tokenizer.ggml.eos_token_id": 5}, {"tokenizer.ggml.eos_token_id": 2}),
    "padding": ({"tokenizer.ggml.padding_token_id": 2}, {"tokenizer.ggml.padding_token_id": 0}),
    "template": ({"tokenizer.chat_template": TEMPLATE + " "}, {"tokenizer.chat_template": TEMPLATE}),
    "bos": ({"tokenizer.ggml.add_bos_token": True}, {"tokenizer.ggml.add_bos_token": False}),
    "bos by the tokenizer": ({"tokenizer.ggml.pre": "llama-bpe"}, {"tokenizer.ggml.add_bos_token": False}),
    "added_eos": ({"tokenizer.ggml.add_eos_token": True}, {"tokenizer.ggml.add_eos_token": False}),
    "context": ({"llama.context_length": 2048}, {}),
    "tokens": ({"tokenizer.ggml.tokens": TOKENS[:-1]}, {}),
}


@pytest.mark.parametrize("case", GATES)
def test_each_gate_sees_what_is_not_the_run(tmp_path, case):
    changes, right = GATES[case]
    [problem] = problems(header(tmp_path, changes), EXPECTED)
    assert (problem.gate, problem.change) == (case.split()[0], right)
    with pytest.raises(MoultError, match="not the model that was measured"):
        check_header(tmp_path / "file.gguf", EXPECTED)
    if right:
        assert problems(header(tmp_path, {**changes, **right}), EXPECTED) == []


def test_a_missing_template_is_put_in(tmp_path):
    [problem] = problems(header(tmp_path, {"tokenizer.chat_template": None}), EXPECTED)
    assert problem.change == {"tokenizer.chat_template": TEMPLATE}


def test_a_run_on_plain_text_keeps_the_bos_of_its_tokenizer(tmp_path):
    plain = dataclasses.replace(EXPECTED, template="")
    assert (
        problems(header(tmp_path, {"tokenizer.chat_template": None, "tokenizer.ggml.add_bos_token": True}), plain) == []
    )


def test_every_stop_token_ends_generation(tmp_path):
    """llama.cpp has keys for three of them: EOS, EOT, EOM."""
    stops = dataclasses.replace(EXPECTED, stops=[2, 5, 6])
    found = problems(header(tmp_path), stops)
    changes = {key: value for problem in found for key, value in problem.change.items()}
    assert {problem.gate for problem in found} == {"stops"}
    assert changes == {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    fixed = header(tmp_path, changes)
    assert problems(fixed, stops) == []
    assert ends_generation(fixed.fields) == {2, 5, 6}
    [left] = problems(fixed, dataclasses.replace(EXPECTED, stops=[2, 5, 6, 7]))
    assert left.gate == "stops" and not left.change


@pytest.mark.parametrize(
    "tokens, ends",
    [
        (["a", "<|endoftext|>", "</s>"], {1, 2}),
        (["a", "<|end|>", "<|return|>", "<|call|>"], {2, 3}),  # gpt-oss goes on behind <|end|>
        (["a", "<|end|>", "<|return|>"], {1, 2}),
        (["a", "</s>", "<|tool_response>"], {2}),  # gemma 4
        (["a", "<|fim_pad|>", "<|file_sep|>"], {1, 2}),
    ],
)
def test_the_texts_at_which_llama_cpp_stops(tokens, ends):
    assert ends_generation({"tokenizer.ggml.tokens": tokens}) == ends


def test_tensors_whose_rows_do_not_fit_are_counted(tmp_path):
    kinds = {
        "token_embd.weight": (14, (8, 256)),
        "a": (6, (4, 384)),
        "b": (8, (4, 128)),
        "norm": (0, (128,)),
        "c": (12, (4, 512)),
    }
    found = header(tmp_path, tensors=kinds)
    assert found.fallback("Q4_K_M") == 2
    assert found.fallback("BF16") == 0
    assert found.types() == {"Q6_K": 1, "Q5_0": 1, "Q8_0": 1, "F32": 1, "Q4_K": 1}


# --- names ------------------------------------------------------------------------------------------------------------

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT_2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def tokenizer_json(*steps: dict, normalizer=None, **model) -> dict:
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    model = {"type": "BPE", "byte_fallback": False, "ignore_merges": False, **model}
    return {"model": model, "pre_tokenizer": pre, "normalizer": normalizer, "decoder": {"type": "ByteLevel"}}


def split(regex: str, behavior: str = "Isolated") -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


@pytest.mark.parametrize("structure", NAMES, ids=NAMES.values())
def test_a_tokenizer_is_known_by_its_structure(structure):
    steps, whole = structure
    parts = {"ByteLevel": GPT_2, "bytes": BYTES, "Digits": DIGITS}
    found = [parts.get(step) or split(step) for step in steps]
    assert name_of(tokenizer_json(*found, ignore_merges=whole)) == NAMES[structure]
    assert name_of(tokenizer_json(*found, ignore_merges=whole, normalizer={"type": "NFC"})) == NAMES[structure]


def test_the_demo_is_smollm():
    assert name_of(read_json(DEMO / "tokenizer.json")) == "smollm"


@pytest.mark.parametrize(
    "tokenizer, what",
    [
        (tokenizer_json(split(r"\w+"), BYTES), r"\\w\+ \+ bytes"),
        (tokenizer_json(split(r"\w+", "Removed"), BYTES), "Removed"),
        (tokenizer_json({**GPT_2, "add_prefix_space": True}), "add_prefix_space"),
        (tokenizer_json({"type": "Digits", "individual_digits": False}, GPT_2), "individual_digits"),
        (tokenizer_json(GPT_2, ignore_merges=True), "with ignore_merges"),
        (tokenizer_json(GPT_2, normalizer={"type": "Lowercase"}), "normalizer"),
        (tokenizer_json(GPT_2, byte_fallback=True), "byte_fallback"),
        (tokenizer_json(GPT_2, type="Unigram"), "Unigram"),
        ({**tokenizer_json(GPT_2), "decoder": None}, "decoder"),
        ({**tokenizer_json(GPT_2), "pre_tokenizer": None}, "null"),
    ],
)
def test_what_llama_cpp_does_not_have_is_not_guessed(tokenizer, what):
    with pytest.raises(MoultError, match=what) as error:
        name_of(tokenizer)
    assert "export.llama_cpp" in error.value.fix


def test_the_name_of_a_run_does_not_make_it_a_phi_3():
    """llama.cpp reads how special tokens treat the space behind them from general.name."""
    phi = {"added_tokens": [{"content": "</s>", "rstrip": True}]}
    other = {"added_tokens": [{"content": "</s>", "rstrip": False}]}
    assert gguf_name("demo", other) == gguf_name("demo", {}) == "demo"
    assert gguf_name("demo", phi) == "demo (phi-3)"
    assert gguf_name("my-Phi3", phi) == "my-Phi3"
    with pytest.raises(MoultError, match="would take its tokenizer for that of Phi-3"):
        gguf_name("phi-3-and-more", other)


# --- llama.cpp of the user --------------------------------------------------------------------------------------------


def make_llama_cpp(folder: Path, *programs: str) -> Path:
    parts = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py")
    for part in (*parts, *programs):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text("")
    (folder / "gguf-py" / "pyproject.toml").write_text('version = "0.19.0"\n')
    return folder


def test_a_folder_of_llama_cpp_is_looked_at(tmp_path):
    folder = make_llama_cpp(tmp_path / "whole", "build/bin/llama-quantize")
    found = find_llama_cpp(str(folder))
    assert found.version == "gguf-py 0.19.0"
    assert found.program("llama-quantize") == str(folder / "build" / "bin" / "llama-quantize")
    (folder / "conversion" / "base.py").unlink()
    with pytest.raises(MoultError, match=r"export.llama_cpp: .* has no conversion/base.py"):
        find_llama_cpp(str(folder))


def test_an_importance_matrix_needs_two_programs(tmp_path):
    folder = make_llama_cpp(tmp_path, "bin/llama-quantize")
    with pytest.raises(MoultError, match=r"export\.imatrix needs llama-imatrix, and") as error:
        check_imatrix_programs(find_llama_cpp(str(folder)))
    assert "export.imatrix: false" in error.value.fix
    make_llama_cpp(tmp_path, "bin/llama-imatrix")
    check_imatrix_programs(find_llama_cpp(str(folder)))


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_the_scale_of_an_adapter_is_that_of_peft():
    config = {"r": 8, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    assert alpha_of(config, {"layers.0.q": 8, "layers.1.q": 8}) == 16
    # 16 / sqrt(8) = alpha / 8
    assert alpha_of({**config, "use_rslora": True}, {"layers.0.q": 8}) == pytest.approx(16 * 8**0.5, abs=1e-5)
    # A rank of 4 with the same alpha is one alpha too; another alpha is not.
    assert alpha_of({**config, "rank_pattern": {"0.q": 4}}, {"layers.0.q": 4, "layers.1.q": 8}) == 16
    with pytest.raises(MoultError, match="different scales"):
        alpha_of({**config, "alpha_pattern": {"0.q": 32}}, {"layers.0.q": 8, "layers.1.q": 8})


def test_only_plain_lora_can_be_gguf(tmp_path):
    names = [f"base_model.model.layers.0.q.lora_{side}.weight" for side in "AB"]
    check_plain(tmp_path, names)
    with pytest.raises(MoultError, match="lora_magnitude_vector"):
        check_plain(tmp_path, [*names, "base_model.model.layers.0.q.lora_magnitude_vector"])


# --- Ollama -----------------------------------------------------------------------------------------------------------


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for number, left in enumerate(a, 1):
        above, row = row, [number]
        for place, right in enumerate(b, 1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (left != right)))
    return row[-1]


TEXTS = st.text(alphabet="ab{%", max_size=12)


@given(TEXTS.filter(bool), TEXTS, st.integers(1, 5))
def test_the_bound_is_a_lower_bound(a, b, size):
    pieces = ["".join(sorted(a[begin : begin + size])) for begin in range(0, len(a), size)]
    distance = levenshtein(a, b)
    assert least_distance(pieces, b, 100) <= distance
    assert least_distance(pieces, a, 100) == 0
    assert least_distance(pieces, b, 2) <= min(distance, 2)
    if size == 1:  # then the text is known
        assert least_distance(pieces, b, 100) == distance


def test_no_text_of_ollamas_templates_is_shipped():
    known = read_json(ROOT / "scripts" / "moult" / "exporting" / "ollama_templates.json")
    assert known["commit"] in known["source"] and len(known["templates"]) == 37
    for one in known["templates"]:
        assert set(one) == {"name", "pieces"}
        assert all(len(piece) == 64 for piece in one["pieces"][:-1])
        assert all(list(piece) == sorted(piece) for piece in one["pieces"])


def test_the_template_of_moult_stays_in_ollama():
    own = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    for template in (CHATML, own):
        assert template_check(template)["kept"] and template_check(template)["distance_at_least"] == 100
    assert template_check("")["kept"]  # without one, Ollama asks nothing


@pytest.mark.parametrize(
    "file, kept",
    [
        ("meta-llama-Llama-3.1-8B-Instruct", None),  # Ollama replaces it
        ("google-gemma-2-2b-it", None),  # this too
        ("zephyr", True),
        ("llama-2-chat", True),
        ("Qwen-Qwen3-0.6B", True),
        ("mistralai-Mistral-Nemo-Instruct-2407", True),
    ],
)
def test_what_ollama_would_replace_is_told(shared, file, kept):
    template = (shared / "chat_templates" / f"{file}.jinja").read_text(encoding="utf-8")
    assert template_check(template)["kept"] is kept


def test_the_modelfile(tmp_path):
    write_modelfile(tmp_path, "mine-Q8_0.gguf", None, ["<|im_end|>", 'say "stop"'], context=32768, longest=6000)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines == [
        "FROM ./mine-Q8_0.gguf",
        "PARAMETER num_ctx 6000",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop """say "stop""""',
    ]
    write_modelfile(tmp_path, "base-BF16.gguf", "mine-adapter.gguf", ["</s>"], context=512, longest=256)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[:3] == ["FROM ./base-BF16.gguf", "ADAPTER ./mine-adapter.gguf", "PARAMETER num_ctx 512"]


# --- the stage, in the environment of the exports ---------------------------------------------------------------------

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def make_model(folder: Path, kind: str, width: int) -> Path:
    """A model of random weights in BF16, with the demo's tokenizer; its rows are multiples of `width`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder, pad="<|pad|>", stops=("<|im_end|>",), template=CHATML)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 3}
    config = AutoConfig.for_model(
        kind, vocab_size=768, head_dim=width // 4, num_key_value_heads=2, max_position_embeddings=512, **sizes, **ids
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def exported(export_python, tmp_path):  # noqa: F811
    """`exported(format, model)`: runs the stage on a model that stands for the base and for the merged one. Returns what it
    wrote beside made.json, and made.json."""

    def run(
        format: str, model: Path, adapter: Path | None = None, settings: dict | None = None, stops=(2,), train=None
    ):
        (tmp_path / "chat_template.jinja").write_text(CHATML)
        stop = {"generation_stop_ids": list(stops), "token_ids": [2]}
        (tmp_path / "report.json").write_text(json.dumps({"stop": stop, "pad_token_id": 3, "max_length": 256}))
        (tmp_path / "merge.json").write_text(json.dumps({"files": {"a": "b"}, "adapter": {"c": "d"}}))
        out = tmp_path / format
        paths = {
            "base": model,
            "merged": model,
            "adapter": adapter or tmp_path,
            "merge": tmp_path / "merge.json",
            "template": tmp_path / "chat_template.jinja",
            "report": tmp_path / "report.json",
            "model": out / "model",
            "made": out / "made.json",
            "log-file": tmp_path / "export_gguf.log",
        }
        command = [export_python, str(ROOT / "scripts" / "export_gguf.py"), "--run", "mine", "--format", format]
        command += ["--settings", json.dumps(settings or {}), "--threads", "2"]
        paths |= {"train": train} if train else {}
        command += [part for name, path in paths.items() for part in (f"--{name}", str(path))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            assert not (out / "model").exists() and not list(out.glob("*.tmp-*"))  # nothing half-written
            raise MoultError(done.stderr)
        return out / "model", read_json(out / "made.json"), done.stderr

    return run


def in_llama_cpp(export_python: str, file: Path, code: str, *arguments: str):  # noqa: F811
    """What `code` prints as JSON, in the environment of the exports; `vocabulary` is that of the file."""
    start = (
        "import json, sys\n"
        "from cyllama.llama.llama_cpp import LlamaModel, LlamaModelParams, disable_logging\n"
        "disable_logging()\n"
        "model = LlamaModel(sys.argv[1], LlamaModelParams(), verbose=False)\n"
        "vocabulary = model.get_vocab()\n"
    )
    command = [export_python, "-c", start + code, str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("format, kind", [("gguf-bf16", "BF16"), ("gguf-q8_0", "Q8_0"), ("gguf-q4_k_m", "Q4_K_M")])
def test_the_demo_is_exported(exported, export_python, format, kind):  # noqa: F811
    model, made, said = exported(format, DEMO)
    file = model / f"mine-{kind}.gguf"
    assert sorted(path.name for path in model.iterdir()) == ["Modelfile", file.name]
    assert set(made["files"]) == {"Modelfile", file.name}
    assert made["bytes"] == sum(path.stat().st_size for path in model.iterdir())
    assert made["made_from"] == {"a": "b"} and made["ollama"]["kept"]
    found = check_header(file, Expected("mine", CHATML, [2], 3, 512))
    assert found.fields["tokenizer.ggml.pre"] == "smollm"
    assert "by its structure it is llama.cpp's smollm" in said
    # Its widths are multiples of 128.
    assert (made["fallback"] > 0) is ("larger type" in said) is (kind == "Q4_K_M")
    assert sum(made["tensors"].values()) == len(found.tensors)
    # Where llama.cpp stops is what the header was read to say.
    ends = in_llama_cpp(
        export_python, file, "print(json.dumps([id for id in range(vocabulary.n_vocab) if vocabulary.is_eog(id)]))"
    )
    assert set(ends) == ends_generation(found.fields) == {0, 2}


@pytest.mark.slow
def test_a_model_of_wide_layers_is_quantized_whole(exported, tmp_path):
    _, made, said = exported("gguf-q4_k_m", make_model(tmp_path / "wide", "qwen3", 256))
    assert made["fallback"] == 0 and "larger type" not in said
    assert set(made["tensors"]) == {"F32", "Q4_K", "Q6_K"}


@pytest.mark.slow
def test_what_the_converter_writes_otherwise_is_put_right(exported, export_python, tmp_path):  # noqa: F811
    """It takes the template in tokenizer_config.json before chat_template.jinja, knows one stop token, and writes that a BOS is
    added."""
    base = make_model(tmp_path / "base", "llama", 64)
    config = read_json(base / "tokenizer_config.json")
    more = {"chat_template": "another", "add_bos_token": True, "bos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    model, _, said = exported("gguf-q8_0", base, stops=(2, 1))
    for what in ("the chat template is another", "would add BOS", "would not stop at token 1"):
        assert what in said
    file = model / "mine-Q8_0.gguf"
    found = check_header(file, Expected("mine", CHATML, [2, 1], 3, 512))
    assert found.fields["tokenizer.ggml.eot_token_id"] == 1
    assert in_llama_cpp(export_python, file, "print(json.dumps([vocabulary.is_eog(1), vocabulary.get_add_bos()]))") == [
        True,
        False,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind, more", [("qwen3", {}), ("llama", {}), ("llama", {"use_rslora": True})])
def test_an_adapter_is_exported(exported, tmp_path, kind, more):
    base = make_model(tmp_path / "base", kind, 64)
    adapter = make_adapter(base, tmp_path / "adapter", {**LORA, **more})
    model, made, _ = exported("adapter-gguf", base, adapter)
    assert sorted(path.name for path in model.iterdir()) == ["Modelfile", "base-BF16.gguf", "mine-adapter.gguf"]
    found = read_header(model / "mine-adapter.gguf")
    alpha = 16 * 8**0.5 if more else 16
    assert found.fields["adapter.lora.alpha"] == pytest.approx(alpha)
    assert made["tensors"] == {"F32": 2 * 7 * 2} and made["made_from"] == {"c": "d"}
    check_header(model / "base-BF16.gguf", Expected("mine", CHATML, [2], 3, 512))
    assert (model / "Modelfile").read_text().startswith("FROM ./base-BF16.gguf\nADAPTER ./mine-adapter.gguf\n")


@pytest.mark.slow
def test_an_adapter_with_another_number_is_caught(export_python, exported, tmp_path):  # noqa: F811
    base = make_model(tmp_path / "base", "llama", 64)
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    model, _, _ = exported("adapter-gguf", base, adapter)

    def change(tensors):
        name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
        tensors[name][3, 2] += 0.01

    change_tensors(adapter, change, "adapter_model.safetensors")
    code = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "from pathlib import Path\n"
        "from moult.exporting.adapter import same_adapter\n"
        "from moult.exporting.gguf import find_llama_cpp\n"
        "from moult.exporting.header import read_header\n"
        "model = Path(sys.argv[1])\n"
        "base = read_header(model / 'base-BF16.gguf')\n"
        "same_adapter(find_llama_cpp(None), model / 'mine-adapter.gguf', base, Path(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [export_python, "-c", code, str(model), str(adapter)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "is not model.layers" in done.stderr and "of the adapter" in done.stderr


@pytest.mark.slow
def test_a_tokenizer_of_no_known_structure_is_refused(exported, tmp_path):
    base = make_model(tmp_path / "base", "llama", 64)
    tokenizer = read_json(base / "tokenizer.json")
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MoultError, match=r"nothing of just its structure: the pre-tokenizer \{'type': 'Digits'"):
        exported("gguf-bf16", base)


@pytest.mark.slow
def test_without_llama_imatrix_the_matrix_is_refused_before_any_work(exported, tmp_path):
    settings = {"imatrix": True, "calibration_rows": 4, "llama_cpp": None}
    with pytest.raises(MoultError, match=r"export\.imatrix needs llama-imatrix and llama-quantize"):
        exported("gguf-q4_k_m", DEMO, settings=settings)
    assert exported("gguf-q8_0", DEMO, settings=settings)[1]["calibration"] is None  # q8_0 weighs nothing


@pytest.mark.slow
def test_the_importance_matrix_is_of_training_rows(exported, export_python, tmp_path):  # noqa: F811
    """With programs that stand for llama.cpp's: they note what they are given."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    code = "from moult.exporting.gguf import find_llama_cpp; print(find_llama_cpp(None).folder)"
    source = subprocess.run(
        [export_python, "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts", check=True
    )
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for part in Path(source.stdout.strip()).iterdir():
        (folder / part.name).symlink_to(part)
    programs = {
        "llama-imatrix": f'echo "$@" > {tmp_path}/imatrix; cp calibration.txt {tmp_path}; echo matrix > imatrix.gguf\n',
        "llama-quantize": f'echo "$@" > {tmp_path}/quantize; cat "$2" > {tmp_path}/matrix; cp "$3" "$4"\n',
    }
    (folder / "bin").mkdir()
    for name, lines in programs.items():
        (folder / "bin" / name).write_text("#!/bin/sh\n" + lines)
        (folder / "bin" / name).chmod(0o755)
    ids = [[1, 20 + row, 2] * 20 for row in range(12)]
    train = tmp_path / "train.parquet"
    pq.write_table(pa.table({"id": [str(row) for row in range(12)], "input_ids": ids}), train)
    settings = {"imatrix": True, "calibration_rows": 4, "llama_cpp": str(folder)}
    with pytest.raises(MoultError, match="the training rows have 60 tokens together"):
        exported("gguf-q4_k_m", DEMO, settings={**settings, "calibration_rows": 1}, train=train)
    _, made, said = exported("gguf-q4_k_m", DEMO, settings=settings, train=train)
    assert made["calibration"] == {"rows": 4, "tokens": 240}
    assert "importance matrix of 4 training rows (240 tokens)" in said
    assert (tmp_path / "matrix").read_text() == "matrix\n"
    given = (tmp_path / "imatrix").read_text().split()
    assert given[2:6] == ["-f", "calibration.txt", "-o", "imatrix.gguf"] and "--parse-special" in given
    assert (tmp_path / "quantize").read_text().split()[:2] == ["--imatrix", "imatrix.gguf"]  # no path of this machine
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    wanted = [tokenizer.decode(row, skip_special_tokens=False) for row in calibration_rows(train, 4)]
    assert (tmp_path / "calibration.txt").read_text() == "\n".join(wanted)


TEXT = (
    "It's 12345 o'clock, SHE'LL say:\n\n\t  don't! 3.14 x² ½ Ⅷ naïve Ünïcödé\r\n   多个汉字，テスト 한국어 हिन्दी ไทย "
    "עברית <tag attr='1'>{{x}}</tag>   end  \n \n x" + "\u00a0nbsp 🚀👍🏽 …—“q”"
)


@pytest.mark.slow
@pytest.mark.parametrize("structure", NAMES, ids=NAMES.values())
def test_llama_cpp_makes_the_same_tokens(exported, export_python, tmp_path, structure):  # noqa: F811
    """A vocabulary that nobody knows, of each structure that has a name."""
    import random

    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    steps, whole = structure
    parts = {"ByteLevel": GPT_2, "bytes": BYTES, "Digits": DIGITS}
    base = make_model(tmp_path / "base", "llama", 64)
    made = json.loads(Tokenizer(models.BPE(ignore_merges=whole)).to_str())
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [parts.get(step) or split(step) for step in steps]}
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 4 + [(ROOT / "README.md").read_text()], trainer)
    saved = json.loads(tokenizer.to_str())
    (base / "tokenizer.json").write_text(json.dumps(saved))
    model, _, said = exported("gguf-bf16", base)
    assert f"it is llama.cpp's {NAMES[structure]}" in said
    shuffled = random.Random(0)
    texts = [TEXT, *("".join(shuffled.sample(TEXT, len(TEXT))) for _ in range(50))]
    code = "print(json.dumps([vocabulary.tokenize(text, False, True) for text in json.loads(sys.argv[2])]))"
    found = in_llama_cpp(export_python, model / "mine-BF16.gguf", code, json.dumps(texts))
    assert found == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
