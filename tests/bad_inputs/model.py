"""The base model's folder: looked at by inspect_model, built without weights by plan."""

import json

from bad_inputs.case import Case, edit_json, edit_tensors, write


def without(*names: str):
    def remove(folder):
        for name in names:
            (folder / "base" / name).unlink()

    return remove


def pickled(folder):
    without("model.safetensors")(folder)
    write("base/pytorch_model.bin", b"\x80\x04")(folder)


def cut(folder):
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header(change):
    """Rewrite the header of the weights, as a liar would: the tensors stay as they are."""

    def rewrite(folder):
        path = folder / "base" / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        changed = json.dumps(change(entries) or entries).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])

    return rewrite


NORM = "model.norm.weight"


def larger(entries):
    entries[NORM]["shape"] = [10**9]


def overlapping(entries):
    first, second = sorted(
        (name for name in entries if name != "__metadata__"), key=lambda n: entries[n]["data_offsets"]
    )[:2]
    begin = entries[first]["data_offsets"][0]
    size = entries[second]["data_offsets"][1] - entries[second]["data_offsets"][0]
    entries[second]["data_offsets"] = [begin, begin + size]


def index(weight_map: dict):
    def make(folder):
        without("model.safetensors")(folder)
        write("base/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))(folder)

    return make


def adapter_folder(folder):
    without("config.json", "model.safetensors")(folder)
    write("base/adapter_config.json", "{}")(folder)


CODE = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilModel"}}

CASES = [
    Case(
        "no such folder",
        (
            "inspect_model failed: nowhere: no such folder\n"
            "what to do: check model.name; a relative path is relative to the working directory"
        ),
        {"model": {"name": "./nowhere"}},
    ),
    Case(
        "no config.json",
        ("inspect_model failed: base: no config.json, so this is not a model folder\nwhat to do: check model.name"),
        make=without("config.json"),
    ),
    Case(
        "config.json that is no JSON",
        (
            "inspect_model failed: base/config.json:1: not JSON (Expecting value)\n"
            "what to do: download or copy the model again"
        ),
        make=write("base/config.json", '{"model_type": '),
    ),
    Case(
        "no weights",
        ("inspect_model failed: base: no model.safetensors\nwhat to do: check model.name"),
        make=without("model.safetensors"),
    ),
    Case(
        "pickle weights only",
        (
            "inspect_model failed: base: weights only as pickle (pytorch_model.bin), which can run code when it is "
            "loaded\n"
            "what to do: convert it once where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        ),
        make=pickled,
    ),
    Case(
        "an adapter",
        (
            "inspect_model failed: base: this is a LoRA adapter, not a model\n"
            "what to do: set model.name to the base model of this adapter"
        ),
        make=adapter_folder,
    ),
    Case(
        "weights cut short",
        (
            "inspect_model failed: base/model.safetensors: not a whole safetensors file: it has 1,777,060 bytes, "
            "and its header says 1,777,160\n"
            "what to do: download or copy the model again"
        ),
        make=cut,
    ),
    Case(
        "weights that are an error page",
        (
            "inspect_model failed: base/model.safetensors: not a whole safetensors file: its header is longer than "
            "the file\n"
            "what to do: download or copy the model again"
        ),
        make=write("base/model.safetensors", "<html>404 Not Found</html>"),
    ),
    Case(
        "weights of a large-file pointer",
        (
            "inspect_model failed: base/model.safetensors: a pointer of Git LFS, not the weights\n"
            "what to do: git lfs pull, or download the model again"
        ),
        make=write("base/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
    ),
    Case(
        "a header that lies about a shape",
        (
            "inspect_model failed: base/model.safetensors: not a whole safetensors file: model.norm.weight is said "
            "to have 256 bytes, and its shape needs 2,000,000,000\n"
            "what to do: download or copy the model again"
        ),
        make=header(larger),
    ),
    Case(
        "a header whose tensors overlap",
        (
            "inspect_model failed: base/model.safetensors: not a whole safetensors file: model.embed_tokens.weight "
            "does not begin where the tensor before it ends\n"
            "what to do: download or copy the model again"
        ),
        make=header(overlapping),
    ),
    Case(
        "a header that is a list",
        (
            "inspect_model failed: base/model.safetensors: not a whole safetensors file: its header is not a JSON "
            "object\n"
            "what to do: download or copy the model again"
        ),
        make=header(lambda entries: [1]),
    ),
    Case(
        "a shard that is missing",
        (
            "inspect_model failed: base: files of the index are missing: model-00001-of-00002.safetensors\n"
            "what to do: download or copy the model again"
        ),
        make=index({NORM: "model-00001-of-00002.safetensors"}),
    ),
    Case(
        "an index that leaves the folder",
        (
            "inspect_model failed: base/model.safetensors.index.json: lists ../other/model.safetensors, "
            "where safetensors files beside it belong\n"
            "what to do: download or copy the model again"
        ),
        make=index({NORM: "../other/model.safetensors"}),
    ),
    Case(
        "code of its own",
        (
            "inspect_model failed: base: the model brings its own Python code (modeling_evil.EvilModel)\n"
            "what to do: read that code, then allow it with model.trust_remote_code: true"
        ),
        make=edit_json("base/config.json", **CODE),
    ),
    Case(
        "a tokenizer with code of its own",
        (
            "inspect_model failed: base: the model brings its own Python code (evil.Tokenizer)\n"
            "what to do: read that code, then allow it with model.trust_remote_code: true"
        ),
        make=edit_json("base/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
    ),
    Case(
        "code that is allowed and not there",
        (
            "plan failed: base: transformers cannot build this model: base does not appear to have a file named "
            "modeling_evil.py. Checkout 'https://huggingface.co/base/tree/main' for available files.\n"
            "what to do: check config.json"
        ),
        {"model": {"trust_remote_code": True}},
        make=edit_json("base/config.json", **CODE),
    ),
    Case(
        "an unknown architecture",
        (
            "plan failed: base: transformers cannot build this model: The checkpoint you are trying to load has "
            "model type `no_such_model` but Transformers does not recognize this architecture. This could be "
            "because of an issue with the checkpoint, or because your version of Transformers is out of date.\n"
            "what to do: check config.json, or set model.trust_remote_code"
        ),
        make=edit_json("base/config.json", model_type="no_such_model", architectures=None),
    ),
    Case(
        "a model that does not write text",
        (
            "plan failed: base: transformers cannot continue a text with a model of the type vit\n"
            "what to do: set model.name to a language model; it may take images or sound as well"
        ),
        make=edit_json("base/config.json", model_type="vit", architectures=None),
    ),
    Case(
        "a quantized model",
        (
            "inspect_model failed: base: the model is quantized (fp8)\nwhat to do: tune the unquantized base: merge adds to it"
        ),
        make=edit_json("base/config.json", quantization_config={"quant_method": "fp8"}),
    ),
    Case(
        "a weight that is missing",
        (
            "plan failed: base: the weights lack model.layers.1.mlp.up_proj.weight\n"
            "what to do: config.json and the weights do not belong together"
        ),
        make=edit_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
    ),
    Case(
        "a config of another size",
        (
            "plan failed: base: the weights lack model.layers.0.mlp.down_proj.weight (is [128, 384], must be "
            "[128, 512]), model.layers.0.mlp.gate_proj.weight (is [384, 128], must be [512, 128]), "
            "model.layers.0.mlp.up_proj.weight (is [384, 128], must be [512, 128]), "
            "model.layers.1.mlp.down_proj.weight (is [128, 384], must be [128, 512]), "
            "model.layers.1.mlp.gate_proj.weight (is [384, 128], must be [512, 128]) and 7 more\n"
            "what to do: config.json and the weights do not belong together"
        ),
        make=edit_json("base/config.json", intermediate_size=512),
    ),
    Case(
        "weights that are not finite",
        (
            "finetune failed: the loss of the longest batch (2 sequences of up to 30 tokens) is nan before the "
            "first step\n"
            "what to do: the base's weights are damaged, or too large for float16: download them again, or set "
            "model.dtype: bfloat16"
        ),
        make=edit_tensors(lambda t: t[NORM].fill_(float("nan"))),
        target="finetune",
    ),
]
