"""Stop a run when it is asked to: what Ctrl-C, SIGTERM, SIGHUP and Ctrl-Break do, and when.

Knows nothing of how a run is saved.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..machine.environment import world_size
from ..machine.terminal import Display
from .loop import Trainer


class StepGivenUpError(KeyboardInterrupt):
    """A second Ctrl-C gave up a step whose gradient was still being computed.

    Weights, optimizers and random numbers are those after the step before, so the run can be saved.
    """


@contextmanager
def stop_signals(
    trainer: Trainer, display: Display, doing: Callable[[], str]
) -> Iterator[list[int]]:
    """Collect requests to stop in a list: Ctrl-C, SIGTERM, and SIGHUP, after a terminal's end.

    On Windows, Ctrl-Break does what Ctrl-C does, as it is all that another process can send.

    The first one says what the run is `doing` before it stops. A second Ctrl-C gives up the step,
    unless it already changes the weights or shares its gradient with other processes; a third one
    interrupts at once. The list stays empty outside the main thread, as Python delivers no signals
    to other threads.
    """
    received: list[int] = []
    typed = (signal.SIGINT, getattr(signal, "SIGBREAK", signal.SIGINT))
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if number == getattr(signal, "SIGHUP", None):
            display.console.quiet = True  # a line to a terminal that is gone would be an error
        if received and number not in typed:
            return
        received.append(number)
        if len(received) > 2:
            raise KeyboardInterrupt
        give_up = trainer.computing_gradient and world_size() == 1
        if len(received) == 1:
            again = "gives the step up" if give_up else "a third time ends at once"
            display.say_now(f"Stopping: {doing()}, and the run is saved. Ctrl-C again {again}.")
            return
        display.say_now("Leaving as soon as the run is saved. Ctrl-C again ends at once.")
        if give_up:
            raise StepGivenUpError

    before = {number: signal.signal(number, receive) for number in stopping_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopping_signals() -> list[int]:
    """Return the signals that ask a run to stop; not SIGHUP where `nohup` has it ignored."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
        numbers.append(hang_up)
    if hasattr(signal, "SIGBREAK"):  # only on Windows: Ctrl-Break, or a window that is closed
        numbers.append(signal.SIGBREAK)
    return numbers
