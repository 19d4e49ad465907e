"""What happens while a model trains, for people: a progress bar, TensorBoard's files, or what a study's runner does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from learn.training.run_length import FIGURE

Losses = Mapping[str, float]
# Steps between two points of the losses in TensorBoard.
LOSS_EVERY = 10


class Listener(Protocol):
    """Is told of each step and each check of a run, and of its end."""

    def step(self, number: int, losses: Losses, learning_rate: float) -> None:
        """Step `number`, from 1, is done."""

    def check(self, record: Mapping[str, float]) -> None:
        """The check of `record` is done: step, seconds, losses and the figures on validation."""

    def end(self, warnings: Sequence[str]) -> None:
        """The run is over; `warnings` is what its curve says against its length."""


class ProgressBar:
    """A bar with the newest losses and NDCG@10; prints the warnings below it."""

    def __init__(self, n_steps: int, done: int) -> None:
        self.bar = tqdm(total=n_steps, initial=done, desc="train", unit="step")

    def step(self, number: int, losses: Losses, learning_rate: float) -> None:
        """Moves the bar."""
        self.bar.update()

    def check(self, record: Mapping[str, float]) -> None:
        """Shows the loss and NDCG@10 of the check beside the bar."""
        loss = sum(value for name, value in record.items() if name.startswith("loss_"))
        self.bar.set_postfix(loss=f"{loss:.3f}", ndcg10=f"{record.get(FIGURE, 0):.4f}")

    def end(self, warnings: Sequence[str]) -> None:
        """Closes the bar and prints the warnings."""
        self.bar.close()
        for warning in warnings:
            print(f"warning: {warning}")


class TensorboardLog:
    """Losses and learning rate every few steps, all of a check at each check."""

    def __init__(self, folder: Path, done: int) -> None:
        """`done` steps were done before; what an interrupted run logged after them is not shown."""
        self.writer = _summary_writer()(str(folder), purge_step=done + 1)

    def step(self, number: int, losses: Losses, learning_rate: float) -> None:
        """Logs the losses and the learning rate of every tenth step."""
        if number % LOSS_EVERY == 0:
            for name, value in losses.items():
                self.writer.add_scalar(f"loss/{name}", value, number)
            self.writer.add_scalar("learning_rate", learning_rate, number)

    def check(self, record: Mapping[str, float]) -> None:
        """Logs the figures on validation and the seconds."""
        for name, value in record.items():
            if name == "step":
                continue
            kind = "check" if name == "seconds" or name.startswith("loss_") else "validation"
            self.writer.add_scalar(f"{kind}/{name}", value, int(record["step"]))
        self.writer.flush()

    def end(self, warnings: Sequence[str]) -> None:
        """Logs the warnings as text, and closes the file."""
        for number, warning in enumerate(warnings):
            self.writer.add_text("warnings", warning, number)
        self.writer.close()


def check_tensorboard() -> None:
    """Raises ValueError if TensorBoard is not installed; for commands that would need it only after hours."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "train.tensorboard (--tensorboard) needs the package `tensorboard`, which is not installed: install it "
            "with `pip install tensorboard`, or leave the setting out"
        ) from error
    return SummaryWriter
