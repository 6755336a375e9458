"""A real Slurm on one machine, for tests: munge, controller and node daemons in a folder of their own.

    apt-get install slurmctld slurmd slurm-client munge           # Debian and Ubuntu; as root
    python tests/sweeps/launchers/one_machine.py start FOLDER [NODES]  # prints the variable that Slurm needs
    SLURM_CONF=FOLDER/slurm.conf squeue
    python tests/sweeps/launchers/one_machine.py lose FOLDER node1     # SIGKILL to its daemon and its jobs
    python tests/sweeps/launchers/one_machine.py stop FOLDER

It takes root, because only root may start jobs as other users. No accounting, no cgroups, no systemd. More than one
node takes a Slurm that allows several slurmd on a machine, as Debian's does; a node is lost when its processes are.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_START_SECONDS = 300
# Requeued jobs wait for `cred_expire` seconds, which is 120 by default; killed ones get SIGKILL after KillWait.
# config_overrides: more cores may be promised than there are, so that two jobs run side by side anywhere.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
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
SlurmdTimeout={lost_after}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
{more}
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} State=UNKNOWN"


def missing() -> str | None:
    """Return why no Slurm can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "only root can start a Slurm"


def host() -> str:
    """Return this machine's name as Slurm shortens it."""
    return socket.gethostname().partition(".")[0]


def start(folder: Path, nodes: int = 1, cores: int = 2, more: str = "", names: Sequence[str] = ()) -> dict[str, str]:
    """Start the daemons and wait until all nodes are idle.

    Args:
        folder: a new one, for everything that they write.
        nodes: how many. A lost one is given up within half a minute where there are others.
        cores: of each node, as many as jobs of one core run at a time.
        more: lines of slurm.conf.
        names: of the nodes, of which processes find only this machine's; none are ``node1`` and so on.

    Returns:
        the environment variables with which Slurm's commands find it.

    Raises:
        RuntimeError: it did not come up, with the end of the logs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"node{number}" for number in range(1, nodes + 1)]
    controller_port, *ports = _free_ports(1 + nodes)
    conf = folder / "slurm.conf"
    conf.write_text(
        _CONF.format(
            host=host(),
            folder=folder,
            controller_port=controller_port,
            lost_after=10 if nodes > 1 else 300,
            nodes="\n".join(
                _NODE.format(name=name, host=host(), port=port, cores=cores)
                for name, port in zip(names, ports, strict=True)
            ),
            more=more,
        ).lstrip()
    )
    (folder / "state").mkdir(exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(conf), "PATH": _path()}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    _run(["munged", "--force", f"--socket={folder}/munge.socket", *files], environment)
    _run(["slurmctld", "-f", str(conf), "-c"], environment)
    for name in names:
        start_node(folder, name)
    wait_until_idle(folder)
    return environment


def start_node(folder: Path, name: str) -> None:
    """Start a node's daemon, which may have been lost."""
    (folder / f"spool.{name}").mkdir(exist_ok=True)
    _run(["slurmd", "-f", f"{folder}/slurm.conf", "-N", name], {"PATH": _path()})


def wait_until_idle(folder: Path) -> None:
    """Wait until all nodes are up, or stop everything and report their logs."""
    for _ in range(5 * _START_SECONDS):
        if (states := _node_states(folder)) == {"idle"}:
            return
        time.sleep(0.2)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in folder.glob("slurm*.log"))
    stop(folder)
    raise RuntimeError(f"Slurm's nodes are {states} after {_START_SECONDS} s:\n{logs}")


def lose_node(folder: Path, name: str, jobs: bool = True) -> None:
    """SIGKILL a node's daemon and, unless told not to, all that runs on the node: what is left when its power goes."""
    _kill(int((folder / f"slurmd.{name}.pid").read_text()), signal.SIGKILL)
    while jobs and (left := list(_processes_on(folder, name))):
        for pid in left:
            _kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes_on(folder: Path, name: str) -> Iterator[int]:
    """Yield the processes of jobs on a node, and their slurmstepd above them."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes()
            status = (path / "stat").read_text().rpartition(")")[2].split()
            parent = Path("/proc", status[1])
            above = (parent / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        ours = {f"SLURM_CONF={folder}/slurm.conf".encode(), f"SLURMD_NODENAME={name}".encode()} <= set(variables)
        if ours and status[0] != "Z" and command:
            yield int(path.name)
            if above.startswith(b"slurmstepd"):
                yield int(parent.name)


def stop(folder: Path) -> None:
    """End the daemons, by the process ids that they wrote."""
    for path in [*sorted(folder.glob("slurmd.*.pid")), folder / "slurmctld.pid", folder / "munge.pid"]:
        if path.exists() and path.read_text().strip():
            pid = int(path.read_text())
            _kill(pid, signal.SIGTERM)
            for _ in range(1000):
                if not _kill(pid, 0):
                    break
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


def _node_states(folder: Path) -> set[str]:
    command = ["sinfo", "--noheader", "--Node", "--format=%t"]
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": _path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return set((done.stdout or done.stderr).split())


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
    """Start or stop it, or lose a node, from a shell."""
    verb, *rest = argv or [""]
    if (verb, len(rest)) not in (("start", 1), ("start", 2), ("lose", 2), ("stop", 1)):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(rest[0]).absolute()
    if verb == "stop":
        stop(folder)
        return 0
    if verb == "lose":
        lose_node(folder, rest[1])
        return 0
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={start(folder, *map(int, rest[1:]))['SLURM_CONF']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
