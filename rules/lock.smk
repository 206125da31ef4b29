"""The lock of the working directory: one that a killed Snakemake has left is taken off."""

import fcntl
import os
import shutil
from pathlib import Path


def hold_folder():
    """Keep the working directory for this Snakemake, and take off a lock that a killed one has left in it.

    Snakemake's own lock does not die with its holder. This one does: each Snakemake holds it shared while it lives, so if
    it can be had alone, nobody is at work here. Some cluster file systems lock for each machine apart: what another
    machine has locked is left to `snakemake --unlock`. Returns the lock, if there is one, and whether nobody else is at work.
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
            pass  # Snakemake's lock says whether the two go together
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock, alone
    except OSError:  # a read-only folder, or a file system without locks
        return None, False


# The name keeps the lock open, and so held, until this Snakemake ends.
held_folder, alone_here = hold_folder() if workflow.is_main_process else (None, False)
