"""Whether rows that are packed into one sequence are kept apart: asked of the model itself, whatever its architecture.

The trainer packs several rows behind each other and tells the model by position_ids where each begins. Models that do not
look at them let rows see each other, without a word (huggingface/transformers#46093, modelscope/ms-swift#9565).
"""

# Of what a row's logits may differ when it is packed, relative to the largest logit. Rounding in float32 gives 1e-6, rows
# that see each other 1e-2 and more.
ROUNDING = 1e-3

# Of what they may change, as a whole, with another row in front. In bfloat16 experts may be chosen otherwise by rounding.
NOISE = 0.05


def packed(rows: list[list[int]], device="cpu") -> dict:
    """The arguments of the forward pass that TRL's trainer gives for these rows in one packed sequence."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    flat = [token for row in rows for token in row]
    example = {"input_ids": flat, "labels": flat, "seq_lengths": [len(row) for row in rows]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([example])
    return {
        name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items() if name != "labels"
    }


def mixing(model, rows: list[list[int]]) -> float:
    """How much the logits of `rows` differ between packed and alone, relative to the largest. 0 but for rounding is right."""
    import torch

    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]
        together = model(**packed(rows), use_cache=False).logits[0].float()
    alone = torch.cat(alone)
    return ((together - alone).abs().max() / alone.abs().max()).item()


def leak(model, rows: list[list[int]], device) -> float:
    """How much the logits of all but the first of `rows` change when the first is turned round: their difference as a whole,
    relative to them. The shapes are the same, so that it is 0 in any dtype where rows do not see each other."""
    import torch

    other, mode = [rows[0][::-1], *rows[1:]], model.training
    model.eval()
    with torch.no_grad():
        before, after = (
            model(**packed(packing, device), use_cache=False).logits[0, len(rows[0]) :].float()
            for packing in (rows, other)
        )
    model.train(mode)
    return ((after - before).norm() / before.norm()).item()
