"""One run in several processes: process ids, ending together, launch recipes. test_train.py covers a whole run."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from pair import Pair

from crpo_jax import cli
from crpo_jax.errors import InputError
from crpo_jax.parallel import processes

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
}
LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"


# --- ending together --------------------------------------------------------------------------------------------------

BODY = """
    import argparse
    import os
    import sys
    import time
    import jax
    from crpo_jax.errors import InputError
    from crpo_jax.parallel import processes

    parser = argparse.ArgumentParser()
    processes.add_process_flags(parser)
    args = parser.parse_args()
    with processes.join_processes("train", args):
        index = jax.process_index()
        items = [(index, "x" * i) for i in range(index + 1)]
        assert processes.gather_from_processes(items) == [(0, ""), (1, ""), (1, "x")]
        assert [*processes.process_share(5)] == [[0, 1], [2, 3, 4]][index]
        assert processes.any_process(index == 1) and not processes.any_process(False)
        sys.stderr.write("joined\\n")
"""


def script(lines: str) -> list[str]:
    """A program that joins, checks the exchange of values, and continues with these lines."""
    return ["-c", textwrap.dedent(BODY) + textwrap.indent(textwrap.dedent(lines), "    ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "raised", "code", "line"),
    [
        (1, "InputError('data.path: /data/x.jsonl: No such file')", 2, "data.path: /data/x.jsonl: No such file"),
        (
            0,
            "SystemExit('crpo_jax.train: stopped, the reward is at fault: 3 of 4\\n  traceback')",
            1,
            "stopped, the reward is at fault: 3 of 4",
        ),
    ],
)
def test_an_error_in_one_process_ends_both_with_its_message(who, raised, code, line):
    """The other process waits in a collective that would never end."""
    ended = Pair(*script(f"if jax.process_index() == {who}: raise {raised}\nprocesses.any_process(True)")).ended()
    assert [code for code, _ in ended] == [code, code], ended
    assert f"crpo_jax.train: process {who} of 2: {line}\n" in ended[who][1]
    if who:  # process 0 hosts the key-value store: when it ends, JAX may abort the other before it has read the message
        assert f"crpo_jax.train: process 0 of 2 ends with process 1: {line}\n" in ended[0][1]


@pytest.mark.slow
def test_the_loss_of_process_0_is_reported_although_jax_aborts():
    """jax.distributed aborts the other process from C++ at once; the line is printed from outside the process."""
    pair = Pair(*script("time.sleep(120)"))
    assert pair.processes[0].stderr is not None
    while "joined" not in pair.processes[0].stderr.readline():
        pass
    pair.processes[0].kill()
    (_, first), (code, second) = pair.ended()
    assert code != 0
    expected = (
        "crpo_jax.train: process 1 of 2 was killed, or aborted by jax.distributed because it lost another process"
    )
    assert expected in second
    assert "crpo_jax.train: process 0 of 2 was killed" in first


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_killed_while_the_others_compile_is_named_at_once(who):
    """No collective is waiting and no heartbeat is due: the other one used to go on for a minute, and then aborted."""
    pair = Pair(*script(f"time.sleep(120) if jax.process_index() != {who} else os.kill(os.getpid(), 9)"))
    began = time.monotonic()
    code, text = pair.ended()[1 - who]
    assert code != 0
    assert re.search(rf"crpo_jax.train: process {1 - who} of 2: process {who} \(pid \d+ on .*\) was killed", text), text
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_processes_that_differ_are_refused_by_name(tmp_path):
    """`python tests/mismatches.py FOLDER` runs every case; here one of each kind of comparison."""
    cases = ["learning rate", "workdir", "held-out questions", "model", "package version"]
    program = [sys.executable, str(Path(__file__).with_name("mismatches.py")), str(tmp_path / "cases"), *cases]
    completed = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert completed.stdout.count("refused") == len(cases)


def test_a_hanging_collective_ends_the_process_with_advice():
    check = """
        import time
        import jax
        from crpo_jax.parallel import processes
        jax.default_backend = lambda: "gpu"
        processes.self_test(lambda: time.sleep(60), seconds=0.2)
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(check)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert completed.returncode == 1
    assert completed.stderr.splitlines()[-1] == (
        "crpo_jax: a sum over all 2 devices did not end within 0.2 seconds; "
        "peer-to-peer copies between these GPUs may be broken: set NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO says more"
    )


def test_the_self_test_passes_and_detects_a_wrong_sum():
    processes.self_test()
    with pytest.raises(SystemExit, match="a sum over all 8 devices gave 35 instead of 36"):
        processes.self_test(lambda: 35.0)


# --- process ids ------------------------------------------------------------------------------------------------------


def parse_flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    processes.add_process_flags(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [
        *processes.PROCESS_FLAGS.values(),
        *(name for name in os.environ if name.startswith("SLURM_")),
        "TPU_ML_PLATFORM",
    ]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--coordinator", "a:1"], "expected all three together, got only --coordinator"),
        (["--processes", "2", "--process", "0"], "expected all three together, got only --processes and --process"),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], "--coordinator: expected HOST:PORT, got 'a'"),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process", "2"],
            "--process: expected 0 to 1, since there are 2 processes, got 2",
        ),
        (["--join-timeout", "0"], "--join-timeout: expected at least 1 second, got 0"),
    ],
)
def test_incomplete_flags_are_refused(no_cluster, arguments, line):
    """A process that does not find the others would train by itself."""
    with pytest.raises(InputError, match=line):
        processes.distributed_arguments(parse_flags(*arguments))


def test_flags_and_variables_are_equivalent(no_cluster):
    by_flags = processes.distributed_arguments(
        parse_flags("--coordinator", "a:1", "--processes", "2", "--process", "1")
    )
    for name, value in zip(processes.PROCESS_FLAGS.values(), ["a:1", "2", "1"], strict=True):
        no_cluster.setenv(name, value)
    assert processes.distributed_arguments(parse_flags()) == by_flags
    assert by_flags == {
        "coordinator_address": "a:1",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


def test_slurm_and_tpu_are_detected(no_cluster):
    assert processes.distributed_arguments(parse_flags()) is None
    no_cluster.setenv("SLURM_NTASKS", "2")
    assert processes.distributed_arguments(parse_flags()) is None  # inside salloc or sbatch, but not started by srun
    no_cluster.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    no_cluster.setenv("SLURM_STEP_NUM_NODES", "2")
    no_cluster.setenv("SLURM_GPUS_ON_NODE", "4")
    per_node = {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2, 3]}
    assert processes.distributed_arguments(parse_flags()) == per_node
    no_cluster.setenv("SLURM_NTASKS", "8")
    assert processes.distributed_arguments(parse_flags()) == {"cluster_detection_method": "slurm"}  # a process per GPU
    no_cluster.setenv("SLURM_NTASKS", "1")
    no_cluster.setenv("TPU_ML_PLATFORM", "JAX")
    no_cluster.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert processes.distributed_arguments(parse_flags()) == {}


def test_what_jax_detects_completes_the_arguments(no_cluster):
    """Before jax.distributed is asked: the processes meet at the same address first."""
    explicit = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert processes.complete_address(explicit, 10) == explicit
    slurm = {"JOB_ID": "70001", "STEP_NODELIST": "node[3-4]", "STEP_NUM_NODES": "2"}
    for name, value in (slurm | {"NTASKS": "2", "PROCID": "1", "LOCALID": "0", "GPUS_ON_NODE": "2"}).items():
        no_cluster.setenv(f"SLURM_{name}", value)
    address = processes.complete_address(processes.distributed_arguments(parse_flags()), 10)
    assert address.pop("coordinator_address").startswith("node3:")
    assert address == {
        "num_processes": 2,
        "process_id": 1,
        "local_device_ids": [0, 1],
        "cluster_detection_method": "deactivate",
    }
    no_cluster.setattr(processes.clusters.ClusterEnv, "_cluster_types", [])
    assert processes.complete_address({}, 10) is None  # a single TPU host


# --- recipes ----------------------------------------------------------------------------------------------------------

ARGUMENTS = ["--mesh", "16x1", "model.path=/share/a model", "reward.tags=[dx, conclusion]"]


def dry_run(recipe: str, **environment: str) -> str:
    completed = subprocess.run(
        ["bash", str(LAUNCH / recipe), "--dry-run", *ARGUMENTS],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return completed.stdout


def train_arguments(command: Sequence[str]) -> argparse.Namespace:
    """The arguments that crpo_jax.train parses from a launched command; its settings must load."""
    at = command.index("crpo_jax.train")
    assert list(command[at - 2 : at]) in (["python", "-m"], [".venv/bin/python", "-m"])
    parser = cli.build_parser("train", "")
    processes.add_process_flags(parser)
    args = parser.parse_args(command[at + 1 :])
    settings = cli.load_settings(args)
    assert (settings.parallel.mesh, settings.model.path, settings.reward.tags) == (
        "16x1",
        "/share/a model",
        ("dx", "conclusion"),
    )
    return args


def test_the_recipe_for_a_tpu_slice():
    lines = [
        shlex.split(line)
        for line in dry_run(
            "tpu_slice.sh", NAME="crpo", ZONE="z", TYPE="v5litepod-16", VERSION="v", SHARE="host:/e"
        ).splitlines()
    ]
    assert [line[:5] for line in lines if line[0] == "gcloud"] == [
        ["gcloud", "compute", "tpus", "tpu-vm", verb] for verb in ("create", "scp", *["ssh"] * 3)
    ]
    assert all("--zone=z" in line and "crpo" in " ".join(line) for line in lines if line[0] == "gcloud")
    mount, install, train = (line[-1].removeprefix("--command=") for line in lines[-3:])
    assert all("--worker=all" in line for line in lines[-4:])
    assert "mount -t nfs host:/e /share" in mount
    assert "'.[tpu]'" in install
    assert train_arguments(shlex.split(train.partition("&& ")[2])).workdir == "/share/runs/crpo"


def test_the_recipe_for_slurm():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").split(" #")[0].partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == "1"
    assert options["signal"] == "TERM@600"  # leaves time to save
    (line,) = dry_run("slurm.sbatch").splitlines()
    command = shlex.split(line)
    assert command[0] == "srun"
    assert "--kill-on-bad-exit=1" in command
    train_arguments(command)


def test_the_recipe_for_kubernetes():
    job_set = yaml.safe_load(dry_run("kubernetes_jobset.sh", NAME="crpo", HOSTS="2", IMAGE="i", CLAIM="c"))
    (hosts,) = job_set["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    (container,) = job["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
    assert set(variables) == set(processes.PROCESS_FLAGS.values())
    assert variables["JAX_NUM_PROCESSES"] == "2"
    name = job_set["metadata"]["name"]
    pod_0 = f"{name}-{hosts['name']}-0-0.{name}"  # a JobSet's name for pod 0 of job 0
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"{pod_0}:8476"
    assert "job-completion-index" in variables["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert train_arguments(container["command"]).workdir == "/share/runs/crpo"
    assert {each["mountPath"] for each in container["volumeMounts"]} == {"/share", "/dev/shm"}


@pytest.mark.parametrize("recipe", ["tpu_slice.sh", "kubernetes_jobset.sh"])
def test_a_recipe_names_missing_variables(recipe):
    completed = subprocess.run(
        ["bash", str(LAUNCH / recipe), "--dry-run"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode != 0
    assert "NAME: name of the" in completed.stderr
