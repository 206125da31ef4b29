"""Early stopping: training ends when the validation loss has not fallen for a while.

What ends it is read off the validations so far, which each checkpoint holds (trainer_state.json). There is no count that a
resumed run could lose: it stops at the step at which an undisturbed one does. (transformers' EarlyStoppingCallback, 5.23, counts
in memory. With restore_callback_states_from_checkpoint its count comes back, and so do the control flags of the saved step.)
"""

import math
from typing import NamedTuple

# Schedules that do not know the last step. With the others the learning rate has not fallen yet when training ends early.
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


class EarlyStopping(NamedTuple):
    """When training ends before its last step, with the meaning of transformers' EarlyStoppingCallback.

    patience: so many validations in a row without a gain end it. None: it is never ended.
    threshold: a lower loss is a gain only if it is lower than the lowest before by more than this, in nats per token.
    """

    patience: int | None
    threshold: float

    @classmethod
    def of(cls, train: dict) -> "EarlyStopping":
        """As the train section of the config has it."""
        return cls(train["early_stopping_patience"], train["early_stopping_threshold"])

    def ends(self, history: list[dict]) -> bool:
        """Whether training ends after these validations. `history`: lines of the log; those of a validation have `eval_loss`."""
        return self.patience is not None and without_gain(history, self.threshold) >= self.patience


def without_gain(history: list[dict], threshold: float) -> int:
    """How many validations there have been since the last gain."""
    lowest, count = math.inf, 0
    for loss in (entry["eval_loss"] for entry in history if "eval_loss" in entry):
        count = 0 if lowest - loss > threshold else count + 1
        lowest = min(lowest, loss)
    return count
