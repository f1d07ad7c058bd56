"""SIGTERM and SIGUSR1: save at the next optimiser step, stop, and say so by the exit code."""

import logging
import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class Preemption(Callback):
    """Turns a signal into an orderly end of training.

    The handler only notes the signal. After each optimiser step all ranks agree whether any of them got one;
    if so, the Trainer stops, and :class:`~difftune.training.checkpoint.Checkpointing` saves as it does at any
    end. Long work between steps polls :meth:`is_preempted`. Use it as a context manager around everything
    that should be interruptible, loading and evaluation too; the old handlers come back at its end::

        with Preemption() as preemption:
            trainer = Trainer(callbacks=[..., preemption], ...)
            trainer.fit(...)
        sys.exit(preemption.exit_code or 0)

    Lightning's own SIGTERM handler is kept out: it broadcasts from inside the handler, which deadlocks with
    several ranks, and ends the process with exit code 0, which a scheduler takes for success.

    Args:
        signals: Signals to answer.
    """

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1)) -> None:
        self.signals = tuple(signals)
        self.signum: int | None = None
        """Number of the signal that was received, by this rank or, once agreed on, by any."""
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._last_step = 0

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
        for number in self.signals:
            if signal.getsignal(number) != self._note:
                self._old_handlers.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._note)

    def uninstall(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep Lightning from installing its handlers, which it does after this hook, and install ours."""
        # Lightning 2.6 has no public switch for this.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where the run starts or goes on."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After an optimiser step, stop if any rank was signalled."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
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
            if self.signum is not None:
                before = self._old_handlers.get(signal.SIGINT)
                if callable(before):
                    # It may have to know: see difftune.interruption.
                    before(signum, frame)
                raise KeyboardInterrupt
            log.warning("stopping after what is being worked on; Ctrl-C again to stop at once")
        self.signum = signum
