"""A real Slurm of one node, this machine, for tests: munge, controller and node daemon in a folder of their own.

    apt-get install slurmctld slurmd slurm-client munge           # Debian and Ubuntu; as root
    python tests/launchers/one_node.py start FOLDER           # prints the variable that Slurm's commands need
    SLURM_CONF=FOLDER/slurm.conf squeue
    python tests/launchers/one_node.py stop FOLDER

It takes root, because only root may start jobs as other users. No accounting, no cgroups, no systemd.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_START_SECONDS = 30
# Requeued jobs wait for `cred_expire` seconds, which is 120 by default; killed ones get SIGKILL after KillWait.
# config_overrides: more cores may be promised than there are, so that two jobs run side by side anywhere.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=3
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why no Slurm can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "only root can start a Slurm"


def start(folder: Path, cores: int = 2) -> dict[str, str]:
    """Start the three daemons and wait until the node is idle.

    Args:
        folder: a new one, for everything that they write.
        cores: of the node, as many as jobs of one core run at a time.

    Returns:
        the environment variables with which Slurm's commands find it.

    Raises:
        RuntimeError: it did not come up, with the end of the logs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(host=host, folder=folder, cores=cores, controller_port=ports[0], node_port=ports[1]).lstrip()
    )
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(conf), "PATH": _path()}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    _run(["munged", "--force", f"--socket={folder}/munge.socket", *files], environment)
    _run(["slurmctld", "-f", str(conf), "-c"], environment)
    _run(["slurmd", "-f", str(conf), "-N", host], environment)
    deadline = time.monotonic() + _START_SECONDS
    while (state := _node_state(environment)) != "idle":
        if time.monotonic() > deadline:
            logs = "\n".join((folder / f"{name}.log").read_text()[-2000:] for name in ("slurmctld", "slurmd"))
            stop(folder)
            raise RuntimeError(f"Slurm's node is {state!r} after {_START_SECONDS} s:\n{logs}")
        time.sleep(0.2)
    return environment


def stop(folder: Path) -> None:
    """End the daemons, by the process ids that they wrote."""
    for name in ("slurmd", "slurmctld", "munge"):
        path = folder / f"{name}.pid"
        if path.exists() and path.read_text().strip():
            pid = int(path.read_text())
            _kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while _kill(pid, 0) and time.monotonic() < deadline:
                time.sleep(0.1)
            _kill(pid, signal.SIGKILL)


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def _node_state(environment: dict[str, str]) -> str:
    command = ["sinfo", "--noheader", "--format=%t"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def main(argv: Sequence[str]) -> int:
    """Start or stop it from a shell."""
    if len(argv) != 2 or argv[0] not in ("start", "stop"):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(argv[1]).absolute()
    if argv[0] == "stop":
        stop(folder)
        return 0
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={start(folder)['SLURM_CONF']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
