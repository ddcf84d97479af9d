"""Progress bars, in a terminal and in a notebook."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import is_in_notebook


class ProgressBar(ProgressCallback):
    """A progress bar that shows loss, mask rate and top-1 accuracy, and does not print each log."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_prediction_step(self, *args: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        if len(eval_dataloader) > 10:  # the bar of a shorter evaluation only flickers
            super().on_prediction_step(*args, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:  # the main process alone has a bar
            names = [name for name in ("loss", "mask_rate", "eval_top1") if name in logs]
            self._shown |= {name.removeprefix("eval_"): f"{logs[name]:.3f}" for name in names}
            self.training_bar.set_postfix(self._shown)


def progress_callback() -> TrainerCallback:
    """The progress bar of a run: in a notebook a bar with a table of metrics, elsewhere a `ProgressBar`."""
    if not is_in_notebook():
        return ProgressBar()
    from transformers.utils.notebook import NotebookProgressCallback  # imports IPython

    class NotebookProgress(NotebookProgressCallback):
        """The bar and table of transformers, with a column for the mask rate."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if args.eval_strategy == "no" and "loss" in logs:  # otherwise each evaluation adds a row
                rate = {"Mask Rate": logs["mask_rate"]} if "mask_rate" in logs else {}
                self.training_tracker.write_line({"Step": state.global_step, "Training Loss": logs["loss"], **rate})

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            rates = [logs["mask_rate"] for logs in state.log_history if "mask_rate" in logs]
            rate = {"eval_mask_rate": rates[-1]} if rates and self.training_tracker is not None else {}
            if self.training_tracker is None and self.prediction_bar is not None:
                self.prediction_bar.close()  # transformers leaves it above the table
            # A new dictionary: transformers removes entries, and Trainer.evaluate returns `metrics`.
            super().on_evaluate(args, state, control, metrics={**rate, **(metrics or {})}, **kwargs)

    return NotebookProgress()
