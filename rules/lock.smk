"""Remove the lock of the working directory if the Snakemake that made it was killed."""

import fcntl
import os
import shutil
from pathlib import Path


def hold_folder():
    """Reserve the working directory for this Snakemake, and remove the lock of a killed one.

    Snakemake's own lock stays when its process is killed. A lock of the operating system does not: every Snakemake holds one,
    shared, while it runs. If this process can get it exclusively, no other Snakemake is running here. On some cluster file
    systems such a lock is valid on one machine only. Therefore the lock of another machine stays until `snakemake --unlock`.
    Returns the lock (or None), and whether no other Snakemake is running here.
    """
    alone = False
    try:
        Path(".snakemake").mkdir(exist_ok=True)
        lock = Path(".snakemake/moult.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.seek(0)
            machine = os.uname().nodename
            if lock.read() in ("", machine) or not any(Path(".snakemake/locks").glob("*")):
                alone = True
                shutil.rmtree(".snakemake/locks", ignore_errors=True)
                lock.truncate(0)
                lock.write(machine)
                lock.flush()
        except BlockingIOError:
            pass  # another Snakemake is running; Snakemake's own lock decides whether both may run
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock, alone
    except OSError:  # a read-only folder, or a file system without locks
        return None, False


# The variable keeps the lock file open, and so the lock, until this Snakemake ends.
held_folder, alone_here = hold_folder() if workflow.is_main_process else (None, False)
