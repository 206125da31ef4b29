"""The trainer's own loss is TRL's, and its batches are those that were chosen."""

import pytest
import torch
from benchmark_training import TINY, make_model, make_rows, moult_trainer
from trl import SFTTrainer


def pass_of(trainer, batch: dict, compute, items) -> tuple[float, torch.Tensor, list[float]]:
    """Loss, gradients, and the share of first choices that are right."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = compute(trainer, trainer.model.train(), dict(batch), num_items_in_batch=items)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
    return loss.item(), torch.cat(gradients), [float(x) for x in trainer._metrics["train"]["mean_token_accuracy"]]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("changes", [{}, {"padding_free": False}])
def test_loss_gradients_and_accuracy_are_trls(changes, plain, tmp_path):
    rows = make_rows(8, seed=3)
    trainer = moult_trainer(make_model(TINY), rows, tmp_path / "state", **changes)
    assert trainer.own_loss and trainer.plain_head
    trainer.plain_head = plain
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    for items in (None, torch.tensor(1000)):
        own = pass_of(trainer, batch, type(trainer).compute_loss, items)
        # TRL counts tokens by the mask.
        theirs = {name: value for name, value in batch.items() if name != "counts"}
        if changes:
            assert "attention_mask" not in batch
            lengths = torch.tensor([len(row["input_ids"]) for row in rows[:4]])
            theirs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        expected = pass_of(trainer, theirs, SFTTrainer.compute_loss, items)
        assert own[0] == pytest.approx(expected[0], rel=1e-5)
        assert (own[1] - expected[1]).abs().max() < 1e-5 * expected[1].abs().max()
        assert own[2] == pytest.approx(expected[2])


@pytest.mark.parametrize("changes", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_what_is_more_than_the_likelihood_is_left_to_trl(changes, tmp_path):
    trainer = moult_trainer(make_model(TINY), make_rows(8, seed=3), tmp_path / "state", padding_free=False, **changes)
    assert not trainer.own_loss
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    assert "attention_mask" in batch
    theirs = {name: value for name, value in batch.items() if name != "counts"}
    expected = SFTTrainer.compute_loss(trainer, trainer.model.train(), theirs).item()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected)


def test_rows_grouped_by_length_take_the_lengths_from_their_column(tmp_path):
    rows = make_rows(12, seed=1)
    trainer = moult_trainer(make_model(TINY), rows, tmp_path / "state", padding_free=False)
    sampler = trainer._get_train_sampler()
    assert sampler.sampler.lengths == [len(row["input_ids"]) for row in rows]
    order = list(sampler)
    assert sorted(order) == list(range(12)) and order == list(sampler)
    longest = max(range(12), key=lambda index: len(rows[index]["input_ids"]))
    assert longest in order[:4]


@pytest.mark.parametrize("free", ["auto", False])
def test_the_log_says_how_fast_it_was(free, tmp_path):
    trainer = moult_trainer(
        make_model(TINY), make_rows(8, seed=2), tmp_path / "state", logging_steps=1, padding_free=free
    )
    (tmp_path / "state" / "training_log.jsonl").touch()
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    total = sum(len(row) for row in trainer.train_dataset["input_ids"])
    assert second["num_tokens"] == total > first["num_tokens"] > 0
    seen = sum(entry["tokens_per_second"] * entry["seconds"] for entry in (first, second))
    assert seen == pytest.approx(total)
    for entry in (first, second):
        assert (entry["padding_share"] == 0.0) is (free == "auto")
        assert entry["padding_share"] < 0.5 and 0 <= entry["data_wait_share"] < 1 and entry["tflops"] > 0
        assert 0 <= entry["mean_token_accuracy"] <= 1
