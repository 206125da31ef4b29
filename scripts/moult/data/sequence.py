"""A sequence of token ids with its labels. Apart from what makes them, so that an edit there does not rerun the training."""

from dataclasses import dataclass

IGNORE = -100  # the label of a token that is not trained (torch's CrossEntropyLoss)


@dataclass
class Sequence:
    """What is trained in one forward pass.

    input_ids, labels: int lists of equal length; labels hold IGNORE where nothing is trained.
    answer_start: index of the first token of the row's last answer, or -1 if that is not in this sequence.
    """

    input_ids: list[int]
    labels: list[int]
    answer_start: int
