"""SIGTERM, SIGUSR1 and Ctrl-C: save at the next optimiser step, stop, and say so by the exit code."""

import logging
import os
import signal
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

_FORWARDED_S = 2.0


class Preemption(Callback):
    """Turns a signal into an orderly end of training.

    The handler only notes the signal. After each optimiser step all ranks agree whether any of them got one;
    if so, the Trainer stops, and :class:`~difftune.training.checkpoint.Checkpointing` saves as it does at any
    end. One that arrives before the first step, in the evaluation there, stops the run before that step: nothing was
    trained that a checkpoint could keep. Long work between steps polls :meth:`is_preempted`. Use it as a context
    manager around everything that should be interruptible, loading and evaluation too; the old handlers come back
    at its end::

        with Preemption() as preemption:
            trainer = Trainer(callbacks=[..., preemption], ...)
            trainer.fit(...)
        sys.exit(preemption.exit_code or 0)

    Lightning's own SIGTERM handler is kept out: it broadcasts from inside the handler, which deadlocks with
    several ranks, and ends the process with exit code 0, which a scheduler takes for success.

    Args:
        signals: Signals to answer.
        in_fit: Signals to answer while a Trainer works, and only then: with Ctrl-C, loading and exporting end at once.
    """

    def __init__(
        self,
        signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1),
        *,
        in_fit: Iterable[signal.Signals] = (signal.SIGINT,),
    ) -> None:
        self.signals, self.in_fit = tuple(signals), tuple(in_fit)
        self.signum: int | None = None
        """Number of the signal that was received, by this rank or, once agreed on, by any."""
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._last_step = 0
        self._interrupted, self._first_interrupt = False, 0.0

    def __enter__(self) -> "Preemption":
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.uninstall()

    @property
    def exit_code(self) -> int | None:
        """128 + signal number, as a shell reports a process ended by a signal; None without one."""
        return None if self.signum is None else 128 + self.signum

    def is_preempted(self) -> bool:
        """Whether this process has received a signal; free of communication."""
        return self.signum is not None

    def install(self) -> None:
        """Put the handlers in place, in the main thread; a second call changes nothing."""
        self._install(self.signals)

    def _install(self, signals: Iterable[signal.Signals]) -> None:
        for number in signals:
            if signal.getsignal(number) != self._note:
                self._old_handlers.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._note)

    def uninstall(self) -> None:
        """Put the old handlers back."""
        self._uninstall(tuple(self._old_handlers))

    def _uninstall(self, signals: Iterable[signal.Signals]) -> None:
        for number in signals:
            if number in self._old_handlers:
                signal.signal(number, self._old_handlers.pop(number))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep Lightning from installing its handlers, which it does after this hook, and install ours."""
        # Lightning 2.6 has no public switch for this.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._install((*self.signals, *self.in_fit))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What is answered in the training alone is answered no more."""
        self._uninstall(set(self.in_fit) - set(self.signals))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where the run starts or resumes; without one, if any rank was signalled."""
        self._last_step = trainer.global_step
        self._stop_if_signalled(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After an optimiser step, stop if any rank was signalled."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        """Agree on the signal, and have the Trainer stop; a collective call."""
        if trainer.world_size > 1:
            agreed = torch.tensor(self.signum or 0, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            # One that arrives while the ranks talk is for the next step: never set back to None.
            signum = int(agreed) or None
            self.signum = signum or self.signum
        else:
            signum = self.signum
        if signum is not None:
            trainer.should_stop = True
            if trainer.is_global_zero:
                name = signal.Signals(signum).name
                log.warning("%s received: stopping after optimiser step %d", name, trainer.global_step)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C is what Ctrl-C was before."""
        if signum == signal.SIGINT:
            # torchrun gets the key as its processes do, and sends it on to them: that is one and the same.
            forwarded = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() < self._first_interrupt + _FORWARDED_S
            if self._interrupted and not forwarded:
                before = self._old_handlers.get(signal.SIGINT)
                if callable(before):
                    # It may have to know: see difftune.interruption.
                    before(signum, frame)
                raise KeyboardInterrupt
            if not self._interrupted:
                self._interrupted, self._first_interrupt = True, time.monotonic()
                log.warning("stopping after what is being worked on; Ctrl-C again to stop at once")
        # The first one says why the run stops.
        self.signum = self.signum or signum
