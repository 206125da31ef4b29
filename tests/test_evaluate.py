"""evaluate: a likelihood that no batching changes, answers that no padding changes, and a merge that is what it should be."""

import math
from argparse import Namespace

import pyarrow.parquet
import pytest
import torch
from merging import make_plan, run_merge
from peft import PeftModel
from planning import LORA
from tiny import copy, make_adapter, make_model, make_tokens

import evaluate_model
from moult.data.token_file import rows_of
from moult.errors import HOPELESS, MoultError
from moult.measuring import answers, divergence
from moult.measuring import likelihood as module
from moult.measuring import rows as measured
from moult.measuring.likelihood import Likelihood, batches, likelihood
from moult.model.device import load_model
from moult.model.estimates import cache_bytes


def mean_nll(results: list[Likelihood]) -> float:
    """Nats per trained token."""
    return sum(result.nll for result in results) / sum(result.tokens for result in results)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "base", max_position_embeddings=256)


@pytest.fixture(scope="module")
def model(base):
    return load(base)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def rows():
    """Sequences of 5 to 200 tokens, with one to three trained spans."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for index in range(60):
        size = 5 + int(195 * torch.rand(1, generator=generator) ** 3)
        ids = torch.randint(3, 128, (size,), generator=generator).tolist()
        labels = [-100] * size
        for start in range(size // 3, size, max(4, size // 3)):
            labels[start : start + size // 5 + 1] = ids[start : start + size // 5 + 1]
        result.append({"id": str(index), "input_ids": ids, "labels": labels})
    return result


@pytest.fixture
def kept(tmp_path):
    return answers.KeptAnswers(tmp_path / "kept", {}, alone=False)


def plain_loop(model, rows) -> list[tuple[float, int, int]]:
    """One row at a time, no padding, the whole softmax."""
    result = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        nll = count = correct = 0
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                nll -= logits[position].log_softmax(-1)[label].item()
                correct += int(logits[position].argmax() == label)
                count += 1
        result.append((nll, count, correct))
    return result


@pytest.fixture(scope="module")
def expected(model, rows):
    return plain_loop(model, rows)


def test_perplexity_is_that_of_a_plain_loop(model, rows, expected):
    found = likelihood(model, rows, 0)
    for result, (nll, count, correct) in zip(found, expected, strict=True):
        assert (result.tokens, result.correct) == (count, correct)
        assert result.nll == pytest.approx(nll, rel=1e-5, abs=1e-5)
    perplexity = math.exp(sum(nll for nll, _, _ in expected) / sum(count for _, count, _ in expected))
    assert math.exp(mean_nll(found)) == pytest.approx(perplexity, rel=1e-6)
    batch_means = [mean_nll(found[start : start + 8]) for start in range(0, len(found), 8)]
    assert math.exp(sum(batch_means) / len(batch_means)) != pytest.approx(perplexity, rel=1e-3)


@pytest.mark.parametrize("budget", [1, 300, 100_000])
def test_batching_does_not_change_it(budget, model, rows, expected, monkeypatch):
    monkeypatch.setitem(module.MAX_TOKENS, "cpu", budget)
    found = likelihood(model, rows, 0)
    assert [r.nll for r in found] == pytest.approx([nll for nll, _, _ in expected], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 8}),
        ("granite", {"logits_scaling": 4.0}),
        ("qwen3", {"adapter": True}),
    ],
)
def test_the_logits_of_a_long_row_come_in_parts(kind, changes, tmp_path, rows, monkeypatch):
    """The layers run once, and the head keeps what the model does besides."""
    adapter, changes = changes.get("adapter"), {key: value for key, value in changes.items() if key != "adapter"}
    model = load(make_model(tmp_path / "base", kind=kind, max_position_embeddings=256, **changes))
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, make_adapter(tmp_path / "base", tmp_path / "adapter", LORA)).eval()
    expected = likelihood(model, rows, 0)
    calls: list[int] = []
    backbone = (model.get_base_model() if adapter else model).base_model
    backbone.layers[0].register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(module, "MAX_LOGITS", 7 * 128)
    monkeypatch.setitem(module.MAX_TOKENS, "cpu", 1)
    found = likelihood(model, rows, 0)
    assert len(calls) == len(rows)
    for one, other in zip(expected, found, strict=True):
        assert (one.tokens, one.correct) == (other.tokens, other.correct)
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
    with torch.inference_mode():
        parts = list(module.scored_logits(model, [rows[0]], 0))
    assert len(parts) > 1 and all(len(logits) <= 7 for logits, _, _ in parts)
    assert "forward" not in vars(backbone)


def test_answers_are_batched_by_the_memory_of_keys_and_values(model, monkeypatch):
    cost = answers.generation_cost(model)
    assert cost(16384) == pytest.approx(1.0)  # a tiny model: the tokens are the limit
    monkeypatch.setattr(answers, "CPU_CACHE", 4 * cache_bytes(model.config, 100, 4))
    assert [len(batch) for batch in batches([100] * 9, 1.0, answers.generation_cost(model))] == [4, 4, 1]


def test_on_a_gpu_the_memory_is_what_the_weights_leave(monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama"), dtype=torch.bfloat16)
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    found = []
    for gigabytes in (16, 80):
        card = Namespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        plan = batches([1024] * 200, 1.0, answers.generation_cost(model))
        found.append(len(plan[0]))
    # Llama-2-7B has half a MiB for each token: 12.6 GiB of weights, and half of the rest.
    assert found == [3, 67]
    # On two of 16 GiB, the weights are there once. Here one of the two devices is `cpu`, the other `meta`.
    model.lm_head = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Namespace(total_memory=16 * 2**30))
    assert len(batches([1024] * 200, 1.0, answers.generation_cost(model))[0]) == 19


def test_the_bytes_of_keys_and_values():
    from transformers import AutoConfig, PretrainedConfig

    llama = AutoConfig.for_model("llama", num_key_value_heads=8)
    assert cache_bytes(llama, 100, 2) == 2 * 2 * 8 * 128 * 32 * 100
    gemma = AutoConfig.for_model("gemma3_text")
    short = sum(kind == "sliding_attention" for kind in gemma.layer_types)
    per_token = 2 * 2 * gemma.num_key_value_heads * gemma.head_dim
    full = len(gemma.layer_types) - short
    assert short > 0 and cache_bytes(gemma, 10_000, 2) == per_token * (full * 10_000 + short * gemma.sliding_window)
    unknown = PretrainedConfig(hidden_size=64, num_hidden_layers=2)
    assert cache_bytes(unknown, 10, 4) == 2 * 4 * 64 * 2 * 10


def test_batches_hold_every_sequence_once_within_the_budget():
    lengths = [3, 50, 7, 7, 20, 1, 49]
    plan = batches(lengths, 60)
    assert sorted(index for batch in plan for index in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60 for batch in plan)
    assert plan[0] == [1]


class Chat:
    pad_id = 0
    tokenizer = staticmethod(
        lambda text, **_: {"input_ids": list(text.encode()), "special_tokens_mask": [0] * len(text.encode())}
    )

    def lost_characters(self, text):
        return "".join(set(text) & {"é", "猫"})

    def decode(self, ids, special=True):
        return " ".join(map(str, ids))


def test_answers_do_not_depend_on_their_neighbours(model):
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 128, (size,), generator=generator).tolist() for size in (2, 9, 30, 31, 5)]
    together = answers.generate(model, prompts, [2], 0, 12)
    alone = [answers.generate(model, [prompt], [2], 0, 12)[0] for prompt in prompts]
    assert together == alone
    assert all(1 <= len(ids) <= 12 for ids in together)


def test_an_answer_ends_with_its_first_stop_token(model, kept):
    free = answers.generate(model, [[5, 6, 7]], [2], 0, 12)[0]
    stop = free[4]
    stopped = answers.generate(model, [[5, 6, 7]], [stop], 0, 12)[0]
    assert stopped == free[: free.index(stop) + 1]
    report = {"stop": {"generation_stop_ids": [stop]}}
    question = {"kind": "prompt", "id": "a", "group": "a", "prompt": "?", "reference": None, "ids": [5, 6, 7]}
    (answer,) = answers.answer(model, [question], Chat(), report, 12, kept)
    assert answer["stopped"] and answer["answer"] == " ".join(map(str, stopped[:-1]))
    (answer,) = answers.answer(model, [question], Chat(), report, free.index(stop), kept)
    assert not answer["stopped"]


@pytest.mark.parametrize("limit", [1, 40, 4096])
def test_margins_do_not_depend_on_the_batch(limit, model, monkeypatch):
    monkeypatch.setitem(answers.MAX_TOKENS, "cpu", limit)
    monkeypatch.setattr(module, "MAX_LOGITS", 3 * model.config.vocab_size)  # in parts
    generator = torch.Generator().manual_seed(3)
    spoken_answers = []
    for size, spoken in ((5, 7), (9, 0), (3, 1), (12, 4)):
        ids = torch.randint(3, model.config.vocab_size, (size + spoken,), generator=generator).tolist()
        spoken_answers.append({"prompt_ids": ids[:size], "token_ids": ids[size:]})
    expected = []
    for answer in spoken_answers:
        start = len(answer["prompt_ids"])
        with torch.inference_mode():
            logits = model(torch.tensor([answer["prompt_ids"] + answer["token_ids"]])).logits[0, start - 1 : -1]
        best = logits.topk(2).values
        expected.append((best[:, 0] - best[:, 1]).tolist())
    found = answers.margins(model, spoken_answers, 0)
    assert [len(leads) for leads in found] == [7, 0, 1, 4]
    for leads, wanted in zip(found, expected, strict=True):
        assert leads == pytest.approx(wanted, abs=2e-4)


def test_answers_stay_within_the_models_window(model, kept):
    question = {"kind": "prompt", "id": "a", "group": "a", "prompt": "?", "reference": None, "ids": [5] * 250}
    (answer,) = answers.answer(model, [question], Chat(), {"stop": {"generation_stop_ids": [999]}}, 40, kept)
    assert len(answer["token_ids"]) == 6


def test_the_general_text_is_measured_as_far_as_the_model_can_read_it(monkeypatch, model):
    monkeypatch.setattr(measured, "general_texts", lambda: {"en-a": "abc" * 40, "fr-b": "été", "zh-c": "猫"})
    (sequence,) = measured.general_sequences(Chat(), 100)
    assert sequence["id"] == "en-a" and sequence["input_ids"] == list(("abc" * 40).encode()[:100])
    assert sequence["labels"] == [-100, *sequence["input_ids"][1:]]
    (found,) = evaluate_model.measure_texts(model, [sequence], 0)
    (expected,) = plain_loop(model, [sequence])
    assert (found["tokens"], found["correct"]) == (99, expected[2])
    assert found["nll"] == pytest.approx(expected[0], rel=1e-5)


def test_the_same_rows_are_chosen_each_time(rows):
    few = evaluate_model.chosen(rows, 7)
    assert few == evaluate_model.chosen(rows, 7) and len(few) == 7
    assert few != rows[:7]
    assert [row for row in rows if row in few] == few
    assert evaluate_model.chosen(rows, None) == evaluate_model.chosen(rows, 1000) == rows


def merge_check(tmp_path, base, merged, adapter, quantization=None) -> dict:
    rows = rows_of(tmp_path / "tokens" / "test.parquet")
    settings = {
        "eval": {"merge_check_rows": 6},
        "quantization": quantization,
        "dtype": "float32",
        "attn_implementation": None,
        "trust_remote_code": False,
    }
    arguments = Namespace(base=str(base), adapter=str(adapter), gpus=1)
    return evaluate_model.compare_with_adapter(load(merged), rows, 0, "cpu", settings, arguments)


def test_merged_and_adapter_agree_and_another_merge_does_not(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA, scale=0.3)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    good = merge_check(tmp_path, base, merged, adapter)
    assert good["mean_kl"] < 1e-6 and good["top1_agreement"] == 1.0
    assert good["rows"] == 6 and good["positions"] > 50
    unmerged = merge_check(tmp_path, base, copy(base, tmp_path / "unmerged"), adapter)
    assert unmerged["mean_kl"] > 1e-2 > good["max_kl"] and unmerged["top1_agreement"] < 1.0


def test_a_quantized_base_is_compared_with_the_merged_model_and_with_the_base(tmp_path):
    """Computed again from whole models, in one piece."""
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA, scale=0.3)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    plain, mean = merge_check(tmp_path, base, merged, adapter), {}
    for kind in ("int8", "nf4"):
        found = merge_check(tmp_path, base, merged, adapter, kind)
        cost = found.pop("quantization")
        assert found == plain and cost["kind"] == kind
        row = evaluate_model.chosen(rows_of(tmp_path / "tokens" / "test.parquet"), 6)
        settings = {"dtype": "float32", "attn_implementation": None, "trust_remote_code": False}
        trained = PeftModel.from_pretrained(load_model(str(base), "cpu", settings, kind), adapter).eval()
        with torch.no_grad():
            ours = [trained(torch.tensor([one["input_ids"]])).logits[0, :-1] for one in row]
            theirs = [load(merged)(torch.tensor([one["input_ids"]])).logits[0, :-1] for one in row]
        trainable = [torch.tensor(one["labels"][1:]) != -100 for one in row]
        p, q = (
            torch.cat([logits[mask] for logits, mask in zip(side, trainable, strict=True)]).double().log_softmax(-1)
            for side in (ours, theirs)
        )
        assert cost["trained_vs_merged"]["mean_kl"] == pytest.approx(
            (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3
        )
        assert cost["base_vs_quantized"]["mean_kl"] > 10 * plain["mean_kl"]
        mean[kind] = cost["trained_vs_merged"]["mean_kl"]
    assert mean["nf4"] > 10 * mean["int8"]


def test_the_logits_kept_for_it_are_limited(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_tokens(tmp_path / "tokens")
    monkeypatch.setattr(divergence, "KEPT_LOGITS", 20 * 128)
    assert merge_check(tmp_path, base, base, adapter)["positions"] == 20


def test_bytes_and_groups_come_from_the_tokens(model, tmp_path):
    rows = pyarrow.parquet.read_table(make_tokens(tmp_path / "tokens") / "test.parquet").to_pylist()
    measured = evaluate_model.measure(model, rows, 0)
    assert [row["bytes"] for row in measured] == [row["trained_bytes"] for row in rows]
    assert [row["group"] for row in measured] == [row["group"] for row in rows]
    assert [row["tokens"] for row in measured] == [sum(label != -100 for label in row["labels"]) for row in rows]


PLACES = {
    "measure": (
        "out of memory while measuring rows of up to 24 tokens: CUDA out of memory.",
        "lower datasets.<name>.max_length",
    ),
    "answer": (
        "out of memory while answering questions of up to 9 tokens with up to 32 tokens: CUDA out of memory.",
        "lower eval.max_new_tokens",
    ),
    "compare_with_adapter": (
        "out of memory while comparing the merged model with base plus adapter: CUDA out of memory.",
        "lower datasets.<name>.max_length",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_running_out_of_memory_is_one_message_and_not_tried_again(place, tmp_path, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. Of the allocated memory 1 GiB")

    nothing = {
        "limit_threads": lambda threads: None,
        "pick": lambda gpus: "cpu",
        "open_model": lambda path: (path, {}),
        "Chat": lambda *_: Chat(),
        "load_model": lambda *_, **__: Namespace(eval=lambda: None),
        "depends_on": lambda *_: {},
        "window_of": lambda model: 100,
        "general_sequences": lambda *_: [],
        "measure": lambda *_: [],
        "measure_texts": lambda *_: [],
        "prompt_questions": lambda *_: [{"ids": [3] * 9}],
        "row_questions": lambda *_: [],
        "instruction_questions": lambda *_: [],
        "answer": lambda *_: [],
        "compare_with_adapter": lambda *_: {"mean_kl": 0.0},
    }
    for name, stub in (nothing | {place: out_of_memory}).items():
        monkeypatch.setattr(evaluate_model, name, stub)
    asked = {"perplexity": True, "max_rows": None, "answer_rows": 0, "max_new_tokens": 32, "prompts": []}
    asked["forgetting"] = True
    settings = {"eval": asked, "chat_template_kwargs": {}, "trust_remote_code": False, "quantization": None}
    files = {name: str(tmp_path / name) for name in ("likelihood", "answers", "general", "kept", "merge_check")}
    arguments = Namespace(model="base", tokens=str(make_tokens(tmp_path / "tokens")), threads=1, gpus=1, **files)
    log = Namespace(info=lambda *_: None, debug=lambda *_: None)
    with pytest.raises(MoultError) as raised:
        evaluate_model.evaluate(settings, arguments, log)
    what, fix = PLACES[place]
    assert raised.value.what.startswith(what) and "Of the allocated" not in raised.value.what
    assert raised.value.fix.startswith(fix) and "eval.gpu" in raised.value.fix
    assert raised.value.exit_code == HOPELESS
