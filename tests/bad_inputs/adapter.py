"""What lies between two stages and was spoiled there: tokens, plan, adapter, measurements."""

from bad_inputs.case import Case, edit_json, edit_tensors, write

ADAPTER = "results/d/adapter/adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(change, target: str = "merge") -> dict:
    return {"spoil": edit_tensors(change, ADAPTER), "target": target}


def rename(tensors):
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = tensors[
        f"{Q_PROJ}.lora_A.weight"
    ].clone()


def half(tensors):
    name = f"{Q_PROJ}.lora_A.weight"
    tensors[name] = tensors[name][:, :64].clone()


def cut(folder):
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-64])


def nothing_trained(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "results/d/tokens/train.parquet"
    table = pq.read_table(path)
    labels = [[-100] * len(row) for row in table["input_ids"].to_pylist()]
    at = table.schema.get_field_index("labels")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(labels, table.schema.field(at).type)), path)


def other_questions(folder):
    path = folder / "results/d/tuned/answers.jsonl"
    path.write_text(path.read_text().replace('"prompt_ids":[', '"prompt_ids":[0,'))


CASES = [
    Case(
        "tokens that train nothing",
        (
            "finetune failed: step 0: the loss is exactly 0: the model does not learn\n"
            "what to do: check in tokens/preview.html that tokens are marked"
        ),
        spoil=nothing_trained,
        target="finetune",
    ),
    Case(
        "a plan cut short",
        ("finetune failed: results/d/plan.json:1: not JSON (Expecting value)\nwhat to do: delete it and run again"),
        spoil=write("results/d/plan.json", '{"steps": '),
        target="finetune",
    ),
    Case(
        "a report that is gone",
        ("finetune failed: results/d/tokens/report.json does not exist\nwhat to do: run the stage that writes it"),
        spoil=lambda folder: (folder / "results/d/tokens/report.json").unlink(),
        target="finetune",
    ),
    Case(
        "an adapter cut short",
        (
            "merge failed: results/d/adapter/adapter_model.safetensors: not a whole safetensors file: it has "
            "84,752 bytes, and its header says 84,816\n"
            "what to do: run finetune again"
        ),
        spoil=cut,
        target="merge",
    ),
    Case(
        "an adapter that lacks a tensor",
        (
            "merge failed: results/d/adapter: the plan has LoRA on model.layers.0.self_attn.q_proj, the adapter "
            "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight\n"
            "what to do: run finetune again"
        ),
        **tensors(lambda t: t.pop(f"{Q_PROJ}.lora_B.weight")),
        in_unit_test="test_merge.py: drop_one",
    ),
    Case(
        "an adapter with a layer too many",
        (
            "merge failed: results/d/adapter: 1 tensors match no layer of the base: "
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight\n"
            "what to do: the adapter is of another base"
        ),
        **tensors(rename),
        in_unit_test="test_merge.py: add_one",
    ),
    Case(
        "an adapter of another base",
        (
            "merge failed: results/d/adapter: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is "
            "(2, 64), the base needs (2, 128)\n"
            "what to do: the adapter is of another base"
        ),
        **tensors(half),
    ),
    Case(
        "an adapter that is not finite",
        (
            "merge failed: model.layers.0.self_attn.q_proj.weight: not finite after the merge\n"
            "what to do: the adapter's weights are too large for the base's dtype"
        ),
        **tensors(lambda t: t[f"{Q_PROJ}.lora_B.weight"].fill_(float("inf"))),
        in_unit_test="test_merge.py: overflow",
    ),
    Case(
        "a base that has changed since the plan",
        (
            "merge failed: base: no tensor for model.layers.0.self_attn.q_proj\n"
            "what to do: run plan again: the base has changed"
        ),
        spoil=edit_tensors(lambda t: t.pop("model.layers.0.self_attn.q_proj.weight")),
        target="merge",
        in_unit_test="test_merge.py: test_a_base_that_has_changed_since_the_plan_is_refused",
    ),
    Case(
        "a merged model that is not the adapter's",
        (
            "score failed: the merged model differs from base plus adapter: mean KL 0.5 nats per token, above "
            "eval.merge_kl_limit 0.05\n"
            "what to do: delete merged/ and run again; if its dtype has few bits (float16, fp8), check samples.jsonl "
            "and relax the limit"
        ),
        spoil=edit_json("results/d/tuned/merge_check.json", mean_kl=0.5),
        target="score",
        in_unit_test="test_score.py: test_a_merge_that_is_not_the_adapter_stops_it",
    ),
    Case(
        "answers to other questions",
        (
            "score failed: base and tuned model were measured on different questions (rows.jsonl:36, rows.jsonl:37, one-word, "
            "yes-or-no, only-the-number and 33 more)\n"
            "what to do: delete results/<run>/base and run again"
        ),
        spoil=other_questions,
        target="score",
        in_unit_test="test_score.py: test_different_questions_are_not_compared",
    ),
]
