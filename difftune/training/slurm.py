"""Slurm: a job that was told to make room goes back into the queue."""

import logging
import os
import signal
import subprocess

log = logging.getLogger(__name__)

_TIMEOUT_S = 60


def requeue_if_asked(signum: int) -> bool:
    """Requeue this Slurm job, if the signal is the one by which Slurm announces the end of its time.

    A script asks for it with ``#SBATCH --signal=USR1@120``; the job then starts again under its number, and resumes
    from the checkpoint. SIGTERM is of `scancel`, or of a preemption that Slurm follows by a requeue of its own. Jobs
    under another scheduler, and shells inside a job, are left alone. Lightning's own way needs its signal handlers,
    which deadlock with several ranks. Call it on one rank.

    Args:
        signum: The signal that stopped the training.

    Returns:
        Whether the job is in the queue again; if that failed, an error is logged.
    """
    job = _job()
    if signum != signal.SIGUSR1 or job is None:
        return False
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        log.error(
            "job %s is NOT in the queue again (%s): submit it once more, it goes on from the checkpoint", job, reason
        )
        return False
    log.warning("job %s is in the queue again", job)
    return True


def _job() -> str | None:
    """Number of the batch job that this process is a step of; None outside of one."""
    # Slurm calls what it starts in a shell of `salloc` or `srun --pty` so.
    if "SLURM_JOB_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
