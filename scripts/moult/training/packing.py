"""Whether rows that are packed into one sequence are kept apart: asked of the model itself, whatever its architecture.

The trainer packs several rows behind each other and tells the model by position_ids where each begins. Models that do not
look at them let rows see each other, without a word (huggingface/transformers#46093, modelscope/ms-swift#9565).

plan asks a small model of the same architecture what may be done to be fast (`try_batches`); finetune asks the real one once
more (`leak`).
"""

import copy
import re

from moult.model.shrunken import BROKEN
from moult.training.trial import distance, first_line

# Of what a row's logits may differ when it is packed, relative to the largest logit. Rounding in float32 gives 1e-6, rows
# that see each other 1e-2 and more.
ROUNDING = 1e-3

# Fields of a config that say how far back a token looks, and the length that the small model gets for them: shorter than
# ROWS, so that what a window hides is hidden there too.
WINDOW = re.compile(r"^(sliding_window|window_size|attention_chunk_size|local_attention_window)$")
SHORT_WINDOW = 8
ROWS = [[token + 3 for token in range(start, start + length)] for start, length in ((0, 20), (30, 13), (80, 9))]

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


def try_batches(small) -> dict[str, str | None]:
    """How rows may be put together without a change of what is computed; for each way the reason why not, or None.

    varlen: rows behind each other, with the attention of moult.model.varlen. unmasked: rows side by side, padded on the
    right, without an attention mask. `small`: of moult.model.shrunken, or None.
    """
    if small is None:
        return dict.fromkeys(("varlen", "unmasked"), "no small model of this architecture can be made")
    model = with_short_windows(small)
    return {"varlen": why_not_varlen(model), "unmasked": why_not_unmasked(model)}


def why_not_varlen(model) -> str | None:
    """Why rows behind each other with moult.model.varlen are not what they are alone with the model's own attention. What that
    attention leaves out (sinks, a bias) shows in the logits, if the layer does not ask for it by name."""
    import torch

    from moult.model.varlen import CALLS, NAME

    model = copy.deepcopy(model)
    calls = CALLS.count
    try:
        with torch.no_grad():
            alone = alone_logits(model, ROWS)
            model.set_attn_implementation(NAME)
            together = model(**packed(ROWS), use_cache=False).logits[0].float()
            model.train()(**packed(ROWS), use_cache=False)  # its attention's dropout shows only here
    except BROKEN as error:
        return first_line(error)
    if CALLS.count == calls:
        return "its layers have an attention of their own"
    return why_not(distance(together, alone))


def why_not_unmasked(model) -> str | None:
    """Why rows padded on the right need an attention mask. Where no token looks ahead, padding is not seen without one."""
    import torch

    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in ROWS])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    try:
        with torch.no_grad():
            masked, unmasked = (
                model(input_ids=ids, attention_mask=mask, use_cache=False).logits[real.bool()].float()
                for mask in (real, None)
            )
    except BROKEN as error:
        return first_line(error)
    return why_not(distance(unmasked, masked))


def why_not(difference: float) -> str | None:
    return None if difference < ROUNDING else f"its logits differ by {difference:.1%} of the largest"


def with_short_windows(small):
    """A copy of the small model whose windows are shorter than ROWS. The weights are the same."""
    config = copy.deepcopy(small.config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if WINDOW.match(name) and type(value) is int:
            setattr(text, name, min(value, SHORT_WINDOW))
    try:
        model = type(small)._from_config(config, dtype=small.dtype)
        model.load_state_dict(small.state_dict())
    except BROKEN:
        return small
    return model.eval()


def alone_logits(model, rows: list[list[int]]):
    """The logits of each row in a batch of its own, behind each other: float32 (tokens, vocabulary)."""
    import torch

    return torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows])


def mixing(model, rows: list[list[int]]) -> float:
    """How much the logits of `rows` differ between packed and alone, relative to the largest. 0 but for rounding is right."""
    import torch

    with torch.no_grad():
        alone = alone_logits(model, rows)
        together = model(**packed(rows), use_cache=False).logits[0].float()
    return distance(together, alone)


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
