"""`launch`: files that start a command on one machine or many, and start the same command again when it was stopped."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from smalti import __version__
from smalti.errors import ConfigError, PreemptedError
from smalti.training.status import NOT_RETRIED
from smalti.workflows.launch_script import commented, restart_script

Emit = Literal["torchrun", "slurm", "k8s", "skypilot"]
SHARED = ("sample", "encode")  # verbs whose work is cut into chunks that processes share without talking

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
_TIME_LIMIT = re.compile(r"(\d+-)?\d+(:\d\d){0,2}|")  # minutes, hours or days, as sbatch reads them
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}  # what fsspec needs for a URL


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """Where a command is started, and how often again: what the command line asks for."""

    emit: Emit
    """torchrun: a bash script. slurm: for sbatch. k8s: for kubectl apply. skypilot: for sky jobs launch."""
    name: str = "smalti"
    """Of the job: lower-case letters, digits and dashes."""
    nodes: int = 1
    """Machines that train together."""
    gpus_per_node: int = 1
    """0 = on the CPU."""
    processes_per_node: int | None = None
    """Left out: one per GPU."""
    array: int = 0
    """Of sample and encode: this many jobs that share the work (slurm, k8s)."""
    chunks: int | None = None
    """Chunks in all, dealt out to the array by number. Left out: each job makes whichever are missing."""
    retries: int = 5
    """Starts in a row without a newer checkpoint before it gives up."""
    backoff: int = 15
    """Seconds before the second start; doubles from one to the next, up to 32 times this."""
    grace: int = 120
    """Seconds from the signal to the end. Must exceed twice the time of a save, which `smalti plan` shows."""
    port: int = 29_400
    """Several machines meet at this port of the first."""
    image: str = ""
    """Container image with Python, torch and smalti (k8s, skypilot)."""
    claim: str = ""
    """PersistentVolumeClaim that data and runs lie on (k8s)."""
    partition: str = ""
    """Of Slurm."""
    time_limit: str = ""
    """Of Slurm, such as 12:00:00."""
    sbatch: tuple[str, ...] = ()
    """More options of Slurm, as in `--sbatch account=me cpus-per-task=16`."""
    accelerators: str = "H100"
    """Kind of GPU (skypilot)."""
    install: str = ""
    """What a fresh machine installs (skypilot). Left out: this version of smalti by pip."""


@dataclass(frozen=True, kw_only=True)
class LaunchRequest(LaunchSettings):
    """What to start, where, and how often again.

    Args:
        command: the words after `smalti`.
        out: the folder that the command writes to, as it is seen there.
        mirror: URL that checkpoints are copied to; "" = none.
        made_by: the command that made the file.

    Raises:
        ConfigError: a value out of its range, or values that do not go together.
    """

    command: tuple[str, ...]
    out: str
    mirror: str = ""
    made_by: tuple[str, ...] = ("smalti", "launch")

    def __post_init__(self) -> None:
        if not self.command:
            raise ConfigError("nothing to start: end with the command, as in `smalti launch --emit slurm -- train ...`")
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("array", 0), ("retries", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("processes_per_node", "chunks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1 (or left out), got {getattr(self, name)}")
        if self.grace < 10:
            raise ConfigError(f"grace is {self.grace} s: a save needs more; `smalti plan` shows how long one takes")
        if not 1024 <= self.port <= 65_535:
            raise ConfigError(f"port must be between 1024 and 65535, got {self.port}")
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name {self.name!r} must be lower-case letters, digits and dashes, start with a letter, and have at "
                "most 52 of them: clusters take no other"
            )
        self._check_array()
        for option in (self.partition, self.time_limit, *self.sbatch):
            if not option.isprintable() or "#" in option:
                raise ConfigError(f"{option!r} cannot stand in a line of a Slurm file")
        if not _TIME_LIMIT.fullmatch(self.time_limit):
            raise ConfigError(f"time_limit {self.time_limit!r} is none of Slurm's, such as 90, 12:00:00 or 2-00:00:00")
        if self.emit == "k8s" and not (self.image and self.claim):
            raise ConfigError(
                "k8s needs --image, which holds Python, torch and smalti, and --claim, the PersistentVolumeClaim that "
                "data and runs lie on"
            )
        if self.image != "".join(self.image.split()):
            raise ConfigError(f"image {self.image!r} has spaces in it: no container image is called so")
        if self.emit == "skypilot" and not self.mirror and self.command[0] == "train":
            raise ConfigError(
                "the disk of a spot machine goes with it: give the command --store.mirror, as in "
                "`--store.mirror s3://bucket/run`"
            )
        if self.emit == "skypilot" and self.array:
            raise ConfigError("arrays are for slurm and k8s; with skypilot, launch the same file several times")

    def _check_array(self) -> None:
        if self.array and self.command[0] not in SHARED:
            raise ConfigError(f"array is for {' and '.join(SHARED)}, whose chunks need no talk; got {self.command[0]}")
        if self.array and self.emit == "torchrun":
            raise ConfigError("array is for slurm and k8s; torchrun shares the chunks among its processes")
        if self.array and self.nodes > 1:
            raise ConfigError(f"an array is of jobs of one machine each, got nodes {self.nodes}")
        if self.chunks is not None and self.chunks < max(1, self.array):
            raise ConfigError(f"chunks {self.chunks} must be at least the {self.array} jobs of the array")
        if self.chunks is not None and not self.array:
            raise ConfigError("chunks deals out the work of an array: give --array too")
        if self.chunks is not None and any(word.split("=")[0] == "--chunks" for word in self.command):
            raise ConfigError("the command has --chunks of its own: leave it to the array")
        if self.command[0] in SHARED and self.nodes > 1:
            raise ConfigError(f"{self.command[0]} shares its work without talk: give --array instead of --nodes")

    @property
    def processes(self) -> int:
        """Processes of one machine."""
        return self.processes_per_node or max(1, self.gpus_per_node)


def launch_file(request: LaunchRequest) -> str:
    """The text of the file."""
    return _EMIT[request.emit](request)


def _torchrun(request: LaunchRequest) -> str:
    how = [f"  bash {request.name}.sh"]
    if request.nodes > 1:
        how = [
            "Start it on each machine with MASTER_ADDR, an address of the first, and NODE_RANK, 0 on the first:",
            f"  MASTER_ADDR=10.0.0.1 NODE_RANK=0 bash {request.name}.sh",
        ]
    head = ["", *how, "", "SIGTERM, SIGUSR1 and Ctrl-C save and end it with 75; the same script continues."]
    return _bash(request, head, before=_meeting(request, "MASTER_ADDR", "NODE_RANK"))


def _slurm(request: LaunchRequest) -> str:
    options = {
        "job-name": request.name,
        "partition": request.partition,
        "time": request.time_limit,
        "nodes": str(request.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(request.gpus_per_node) if request.gpus_per_node else "",
        "signal": f"B:USR1@{request.grace}",
        "open-mode": "append",
        "output": f"{request.name}-%{'A_%a' if request.array else 'j'}.out",
        "array": f"0-{request.array - 1}" if request.array else "",
    }
    lines = [f"#SBATCH --{name}={value}\n" for name, value in options.items() if value]
    lines += [f"#SBATCH --{option.removeprefix('--')}\n" for option in ("requeue", *request.sbatch)]
    head = [
        "",
        f"  sbatch {request.name}.sbatch",
        "",
        f"Slurm sends SIGUSR1 {request.grace} s before the job's time is over: the run saves, and the job queues",
        "again. A job that is preempted gets SIGTERM and is queued again by Slurm. Submit it where the command's paths",
        "lead from.",
    ]
    first = 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n' if request.nodes > 1 else ""
    before = first + _dealt(request, "SLURM_ARRAY_TASK_ID")
    names = "SMALTI NODES PROCESSES PORT" + (" MASTER_ADDR" if request.nodes > 1 else "")
    start = (
        f'exec srun --wait="$GRACE" bash -c "$(declare -f node); $(declare -p {names}); '
        'RENDEZVOUS=$SLURM_JOB_ID-$attempt; NODE_RANK=\\$SLURM_NODEID; node"'
    )
    # After SIGTERM the job is Slurm's: preempted, and queued again by it, or cancelled by its user.
    stopped = '[ "$signal" != USR1 ] || scontrol requeue "$SLURM_JOB_ID"'
    return _bash(request, head, directives="".join(lines), before=before, start=start, stopped=stopped)


def _k8s(request: LaunchRequest) -> str:
    several, jobs = request.nodes > 1, request.array or request.nodes
    before = "NODE_RANK=$JOB_COMPLETION_INDEX\n" if several else _dealt(request, "JOB_COMPLETION_INDEX")
    before += f"MASTER_ADDR={request.name}-0.{request.name}\nRENDEZVOUS={request.name}\n" if several else ""
    limits: dict[str, Any] = {"nvidia.com/gpu": request.gpus_per_node} if request.gpus_per_node else {}
    labels = {"app": request.name}
    container = {
        "name": "smalti",
        "image": request.image,
        "command": ["bash", "/launch/run.sh"],
        "workingDir": "/runs",
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "launch", "mountPath": "/launch"},
            {"name": "runs", "mountPath": "/runs"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
        ],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the policy below judges exit codes, and asks for this
        "terminationGracePeriodSeconds": request.grace,
        "containers": [container],
        "volumes": [
            {"name": "launch", "configMap": {"name": request.name}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": request.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if several:
        pod["subdomain"] = request.name
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        _on_exit("Ignore", PreemptedError.exit_code),
        _on_exit("FailJob", 1, *NOT_RETRIED),  # 1: the script itself has tried as often as is any use
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": request.name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": jobs,
            "parallelism": jobs,
            "backoffLimit": request.retries * jobs,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": labels},
                "spec": pod | ({"subdomain": request.name} if several else {}),
            },
        },
    }
    script = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": request.name, "labels": labels},
        "data": {"run.sh": _bash(request, [], before=before)},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",  # gives the pods names that they find each other by
        "metadata": {"name": request.name, "labels": labels},
        "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
    }
    head = [
        "",
        f"  kubectl apply -f {request.name}.yaml",
        "",
        f"The claim {request.claim} must exist; it is /runs in the pods, and the command's paths lead from there.",
        "Several machines need one that many may write to (ReadWriteMany). A pod that is asked to stop saves, ends",
        "with 75 and is made again; exit codes that another start would not change end the job. Kubernetes 1.31 or",
        "newer.",
    ]
    return _documents(request, head, [script, *([service] if several else []), job])


def _skypilot(request: LaunchRequest) -> str:
    several = request.nodes > 1
    package = _PACKAGES.get(request.mirror.partition("://")[0], "")
    install = request.install or shlex.join(
        ["pip", "install", f"smalti=={__version__}", *([package] if package else [])]
    )
    before = 'MASTER_ADDR=$(head -n 1 <<< "$SKYPILOT_NODE_IPS")\nNODE_RANK=$SKYPILOT_NODE_RANK\n' if several else ""
    before += "RENDEZVOUS=$SKYPILOT_TASK_ID\n" if several else ""
    resources: dict[str, Any] = {"use_spot": True}
    if request.gpus_per_node:
        resources["accelerators"] = f"{request.accelerators}:{request.gpus_per_node}"
    if request.image:
        resources["image_id"] = f"docker:{request.image.removeprefix('docker:')}"
    resources["job_recovery"] = {
        "strategy": "EAGER_NEXT_REGION",
        "max_restarts_on_errors": 0,  # the script has tried as often as is any use
        "recover_on_exit_codes": [PreemptedError.exit_code],
    }
    task = {
        "name": request.name,
        "workdir": ".",
        "num_nodes": request.nodes,
        "resources": resources,
        "setup": f"{install}\n",
        "run": _bash(request, [], before=before),
    }
    again = f"the run goes on from {request.mirror}" if request.mirror else "the work starts anew"
    head = [
        "",
        f"  sky jobs launch {request.name}.yaml",
        "",
        f"A machine that is taken away is replaced, and {again}. The folder that this is started",
        "in goes along (workdir); what is not in it must be named by URL, and the machine needs the right to it.",
    ]
    return _documents(request, head, [task])


def _on_exit(action: str, *codes: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"containerName": "smalti", "operator": "In", "values": list(codes)}}


def _bash(
    request: LaunchRequest,
    head: Sequence[str],
    *,
    directives: str = "",
    before: str = "",
    start: str = "node",
    stopped: str = ":",
) -> str:
    """A whole script: first line, what Slurm reads, comments, settings and the loop."""
    values: Mapping[str, str | int | Sequence[str]] = {
        "SMALTI": request.command,
        "OUT": request.out,
        "NODES": request.nodes,
        "PROCESSES": request.processes,
        "PORT": request.port,
        "RETRIES": request.retries,
        "BACKOFF": request.backoff,
        "GRACE": request.grace,
    }
    script = restart_script(
        values, checkpoints=request.command[0] == "train", before=before, start=start, stopped=stopped
    )
    return f"#!/usr/bin/env bash\n{directives}{commented([*_origin(request), *head])}\nset -u\n{script}"


def _meeting(request: LaunchRequest, *names: str) -> str:
    """Stop with a sentence where a variable is missing that says where this machine stands."""
    if request.nodes == 1:
        return ""
    asked = "".join(f': "${{{name}:?set it, as the head of this file says}}"\n' for name in names)
    return f"{asked}RENDEZVOUS={request.name}\n"


def _dealt(request: LaunchRequest, index: str) -> str:
    """This job's share of the chunks, from its number in the array."""
    if request.chunks is None:
        return ""
    share = [f"$(({request.chunks} * ({index} + {k}) / {request.array}))" for k in (0, 1)]
    return f'SMALTI+=(--chunks "{share[0]}:{share[1]}")\n'


def _origin(request: LaunchRequest) -> list[str]:
    return [f"Made by smalti {__version__} with:", f"  {shlex.join(request.made_by)}"]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that a script can be read in its file; everything in its own place."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _documents(request: LaunchRequest, head: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> str:
    # Keys stay as written, and long lines whole: a folded line would be another script.
    text = yaml.dump_all(parts, Dumper=_Dumper, sort_keys=False, width=10**6, allow_unicode=True)
    return commented([*_origin(request), *head]) + "\n" + text


_EMIT: dict[str, Callable[[LaunchRequest], str]] = {
    "torchrun": _torchrun,
    "slurm": _slurm,
    "k8s": _k8s,
    "skypilot": _skypilot,
}
