"""One run in several processes: who is who, an end for all where one ends, the recipes that launch it. test_train.py has a whole run."""

import argparse
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from pair import Pair

from crpo_jax import cli
from crpo_jax.errors import InputError
from crpo_jax.parallel import processes

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"


# --- ending together --------------------------------------------------------------------------------------------------

BODY = """
    import argparse
    import sys
    import time
    import jax
    from crpo_jax.config import InputError
    from crpo_jax.parallel import processes

    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    args = parser.parse_args()
    with processes.joined("train", args):
        assert processes.gathered([(jax.process_index(), "x" * i) for i in range(jax.process_index() + 1)]) == [(0, ""), (1, ""), (1, "x")]
        assert [*processes.share(5)] == [[0, 1], [2, 3, 4]][jax.process_index()]
        assert processes.anywhere(jax.process_index() == 1) and not processes.anywhere(False)
        sys.stderr.write("joined\\n")
"""


def script(of_each: str) -> list[str]:
    """A program that joins, checks what processes tell each other, and goes on with these lines."""
    return ["-c", textwrap.dedent(BODY) + textwrap.indent(textwrap.dedent(of_each), "    ")]


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
def test_what_ends_one_ends_the_other_and_says_why(who, raised, code, line):
    """The other one waits in a collective that would never end."""
    ended = Pair(*script(f"if jax.process_index() == {who}: raise {raised}\nprocesses.anywhere(True)")).ended()
    assert [one for one, _ in ended] == [code, code], ended
    assert f"crpo_jax.train: process {who} of 2: {line}\n" in ended[who][1]
    if who:  # the first process keeps what they tell each other: where it ends, JAX may end the others before they have read why
        assert f"crpo_jax.train: process 0 of 2 ends with process 1: {line}\n" in ended[0][1]


@pytest.mark.slow
def test_the_loss_of_the_first_process_is_said_though_jax_aborts():
    """jax.distributed ends the others from C++ at once; the line comes from outside the process."""
    pair = Pair(*script("time.sleep(120)"))
    assert pair.processes[0].stderr is not None
    while "joined" not in pair.processes[0].stderr.readline():
        pass
    pair.processes[0].kill()
    (_, first), (code, second) = pair.ended()
    assert code != 0
    assert (
        "crpo_jax.train: process 1 of 2 was killed, or ended by jax.distributed because it lost another one" in second
    )
    assert "crpo_jax.train: process 0 of 2 was killed" in first


def test_a_collective_that_hangs_ends_the_process_with_what_to_try():
    check = """
        import time
        import jax
        from crpo_jax.parallel import processes
        jax.default_backend = lambda: "gpu"
        processes.self_test(lambda: time.sleep(60), seconds=0.2)
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(check)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "crpo_jax: a sum over all 2 devices did not end within 0.2 seconds; peer-to-peer copies between these GPUs may be broken: "
        "set NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO says more"
    )


def test_the_self_test_adds_up_and_finds_a_wrong_sum():
    processes.self_test()
    with pytest.raises(SystemExit, match="a sum over all 8 devices gave 35 instead of 36"):
        processes.self_test(lambda: 35.0)


# --- who is who -------------------------------------------------------------------------------------------------------


def asked(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [
        *processes.FLAGS.values(),
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
    ],
)
def test_half_a_cluster_is_refused(nowhere, arguments, line):
    """A process that does not find the others would train alone on its own."""
    with pytest.raises(InputError, match=line):
        processes.cluster(asked(*arguments))


def test_flags_and_variables_say_the_same(nowhere):
    by_flags = processes.cluster(asked("--coordinator", "a:1", "--processes", "2", "--process", "1"))
    for name, value in zip(processes.FLAGS.values(), ["a:1", "2", "1"], strict=True):
        nowhere.setenv(name, value)
    assert processes.cluster(asked()) == by_flags
    assert by_flags == {
        "coordinator_address": "a:1",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


def test_slurm_and_tpu_are_found(nowhere):
    assert processes.cluster(asked()) is None
    nowhere.setenv("SLURM_NTASKS", "2")
    assert processes.cluster(asked()) is None  # inside salloc or sbatch, but not started by srun
    nowhere.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    nowhere.setenv("SLURM_STEP_NUM_NODES", "2")
    nowhere.setenv("SLURM_GPUS_ON_NODE", "4")
    assert processes.cluster(asked()) == {
        "cluster_detection_method": "slurm",
        "local_device_ids": [0, 1, 2, 3],
    }  # a process per node
    nowhere.setenv("SLURM_NTASKS", "8")
    assert processes.cluster(asked()) == {"cluster_detection_method": "slurm"}  # a process per GPU
    nowhere.setenv("SLURM_NTASKS", "1")
    nowhere.setenv("TPU_ML_PLATFORM", "JAX")
    nowhere.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert processes.cluster(asked()) == {}


# --- recipes ----------------------------------------------------------------------------------------------------------

ARGUMENTS = ["--mesh", "16x1", "model.path=/share/a model", "reward.grpo_tags=[dx, conclusion]"]


def dry_run(recipe: str, **environment: str) -> str:
    done = subprocess.run(
        ["bash", str(LAUNCH / recipe), "--dry-run", *ARGUMENTS],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def trained(command: Sequence[str]) -> argparse.Namespace:
    """What crpo_jax.train reads of a launched command; its settings must load."""
    at = command.index("crpo_jax.train")
    assert list(command[at - 2 : at]) in (["python", "-m"], [".venv/bin/python", "-m"])
    parser = cli.build_parser("train", "")
    processes.add_flags(parser)
    args = parser.parse_args(command[at + 1 :])
    settings = cli.load_settings(args)
    assert (settings.parallel.mesh, settings.model.path, settings.reward.grpo_tags) == (
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
    assert trained(shlex.split(train.partition("&& ")[2])).workdir == "/share/runs/crpo"


def test_the_recipe_for_slurm():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").split(" #")[0].partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert (options["ntasks-per-node"], options["signal"]) == (
        "1",
        "TERM@600",
    )  # a process per node; time to save before the end
    (line,) = dry_run("slurm.sbatch").splitlines()
    command = shlex.split(line)
    assert command[0] == "srun"
    assert "--kill-on-bad-exit=1" in command
    trained(command)


def test_the_recipe_for_kubernetes():
    made = yaml.safe_load(dry_run("kubernetes_jobset.sh", NAME="crpo", HOSTS="2", IMAGE="i", CLAIM="c"))
    (hosts,) = made["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    (container,) = job["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
    assert set(variables) == set(processes.FLAGS.values())
    assert variables["JAX_NUM_PROCESSES"] == "2"
    name = made["metadata"]["name"]
    assert (
        variables["JAX_COORDINATOR_ADDRESS"] == f"{name}-{hosts['name']}-0-0.{name}:8476"
    )  # a JobSet's name for pod 0 of job 0
    assert "job-completion-index" in variables["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert trained(container["command"]).workdir == "/share/runs/crpo"
    assert {each["mountPath"] for each in container["volumeMounts"]} == {"/share", "/dev/shm"}


@pytest.mark.parametrize("recipe", ["tpu_slice.sh", "kubernetes_jobset.sh"])
def test_a_recipe_says_what_it_needs(recipe):
    done = subprocess.run(
        ["bash", str(LAUNCH / recipe), "--dry-run"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "NAME: name of the" in done.stderr
