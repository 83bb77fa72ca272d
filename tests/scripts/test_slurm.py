"""Job files of Slurm, as far as stand-ins for its commands go: no queue, two nodes on one host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bort.cluster import Cluster
from bort.errors import UserError
from tests.conftest import ROOT
from tests.data.test_create_pretraining_data import content
from tests.nodes import wait_until
from tests.pretraining.helpers import arguments, write_data

PROGRAM = "create_pretraining_data.py"
# sbatch starts the job at once, in a process group of its own whose number is that of the job.
SBATCH = """#!{python}
import os, re, subprocess, sys
words, nodes = sys.argv[1:], "1"
while words[0].startswith("--"):
    nodes = words.pop(0).removeprefix("--nodes=")
nodes = (re.findall(r"^#SBATCH --nodes=(\\d+)", open(words[0]).read(), re.M) or [nodes])[0]
script = open(words[0]).read()
log = open("slurm.log", "a")
variables = dict(SLURM_SUBMIT_DIR=os.getcwd(), SLURM_JOB_NUM_NODES=nodes, SLURM_JOB_NODELIST="n")
start = 'export SLURM_JOB_ID=$$; exec bash -c "$0" "$@"'
job = subprocess.Popen(
    ["bash", "-c", start, script, *words], stdout=log, stderr=log,
    env={{**os.environ, **variables}}, start_new_session=True,
)
print("Submitted batch job", job.pid)
"""
SRUN = """#!{python}
import os, subprocess, sys
tasks = [subprocess.Popen(sys.argv[1:]) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
printf 'localhost\\n127.0.0.1\\n'
"""
SCANCEL = """#!/bin/bash
for job in "$@"; do kill -TERM -- "-$job" 2>/dev/null; done
exit 0
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put stand-ins on the path, and make a folder like the project's with its environment."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (
        ("sbatch", SBATCH),
        ("srun", SRUN),
        ("scontrol", SCONTROL),
        ("scancel", SCANCEL),
    ):
        (commands / name).write_text(text.format(python=sys.executable))
        (commands / name).chmod(0o755)
    project = tmp_path / "project"
    (project / ".venv" / "bin").mkdir(parents=True)
    activate = f'PATH={Path(sys.executable).parent}:{commands}:"$PATH"\n'
    (project / ".venv" / "bin" / "activate").write_text(activate)
    for path in (PROGRAM, "run_pretraining_distillation_hvd.py"):
        (project / path).symlink_to(ROOT / path)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return project


def submit(project, *words):
    """Submit a job; return its number."""
    done = subprocess.run(
        ["sbatch", *words], cwd=project, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def ended(job):
    try:
        os.killpg(job, 0)
    except ProcessLookupError:
        return True
    return False


def text_flags(output):
    text = ROOT / "test_data" / "sample_text.txt"
    return ["--input_file", str(text), "--output_dir", str(output), "--num_outputs", "3"]


def create(project, *flags):
    command = [sys.executable, PROGRAM, *flags]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.cluster
def test_the_job_file_of_a_command_with_cluster(slurm, tmp_path):
    pytest.importorskip("distributed")
    flags = text_flags(tmp_path / "jobs")
    job = submit(slurm, str(ROOT / "scripts/slurm/cluster.sbatch"), PROGRAM, *flags)
    wait_until(lambda: ended(job), (slurm / "slurm.log").read_text)
    log = (slurm / "slurm.log").read_text()
    assert log.count("Registered to:") == 2, log
    create(slurm, *text_flags(tmp_path / "one"))
    assert content(tmp_path / "jobs") == content(tmp_path / "one")
    assert not list(slurm.glob("scheduler-*"))


@pytest.mark.parametrize("left", [None, "{\n}"])
def test_a_job_whose_scheduler_does_not_start_ends(slurm, left):
    """Also one that Slurm has requeued: a killed node has left the file of another scheduler."""
    if left:
        (slurm / "scheduler-1.json").write_text(left)
    (slurm / ".venv" / "bin" / "activate").write_text("PATH=/usr/bin:/bin\n")  # without dask
    command = ["bash", str(ROOT / "scripts/slurm/cluster.sbatch"), PROGRAM]
    variables = {**os.environ, "SLURM_SUBMIT_DIR": str(slurm), "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 1
    assert done.stderr.endswith("error: the scheduler ended (see above)\n")


@pytest.mark.cluster
def test_workers_that_the_command_submits_itself(slurm, tmp_path):
    pytest.importorskip("dask_jobqueue")
    queue = tmp_path / "queue.yaml"
    queue.write_text(
        f"jobs: 2\ncores: 1\nmemory: 1GB\nqueue: short\nlog_directory: {tmp_path / 'logs'}\n"
        f"local_directory: {tmp_path}\n"
    )
    create(slurm, *text_flags(tmp_path / "jobs"), "--cluster", f"slurm:{queue}")
    create(slurm, *text_flags(tmp_path / "one"))
    assert content(tmp_path / "jobs") == content(tmp_path / "one")
    log = (slurm / "slurm.log").read_text()
    assert log.count("Registered to:") == 2, log


@pytest.mark.cluster
def test_mistakes_in_the_file_of_a_queue(slurm, tmp_path):
    pytest.importorskip("dask_jobqueue")
    queue = tmp_path / "queue.yaml"
    for text, message in (
        ("cores: 1\nmemory: 1GB\n", "needs a line `jobs: N`"),
        ("jobs: 0\ncores: 1\nmemory: 1GB\n", "needs a line `jobs: N`"),
        ("jobs: true\ncores: 1\nmemory: 1GB\n", "needs a line `jobs: N`"),
        ("jobs: 1\ncores: 1\nmemory: 1GB\nscheduler_options: 3\n", "not a mapping"),
        ("jobs: 1\n", "cores"),
        ("jobs: 1\ncores: 1\nmemory: 1GB\nnonsense: 3\n", "nonsense"),
    ):
        queue.write_text(text)
        flags = [*text_flags(tmp_path / "jobs"), "--cluster", f"slurm:{queue}"]
        command = [sys.executable, PROGRAM, *flags]
        done = subprocess.run(command, cwd=slurm, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: --cluster slurm:{queue}: ")
        assert message in line


@pytest.mark.cluster
def test_a_job_that_the_queue_refuses_ends_the_program(slurm, tmp_path):
    pytest.importorskip("dask_jobqueue")
    queue = tmp_path / "queue.yaml"
    queue.write_text("jobs: 2\ncores: 1\nmemory: 1GB\n")
    commands = tmp_path / "commands"
    (commands / "sbatch").write_text(
        "#!/bin/bash\n"
        f"mkdir {tmp_path / 'first'} 2>/dev/null && echo 'Submitted batch job 7' && exit\n"
        "echo 'sbatch: error: job limit reached' >&2\nexit 1\n"
    )
    (commands / "scancel").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path / "cancelled"}\n')
    flags = [*text_flags(tmp_path / "jobs"), "--cluster", f"slurm:{queue}"]
    done = subprocess.run(
        [sys.executable, PROGRAM, *flags],
        cwd=slurm,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"error: --cluster slurm:{queue}: sbatch refused a job: sbatch: error: job limit reached\n"
    )
    assert (tmp_path / "cancelled").read_text().split() == ["7"]


def test_a_ctrl_c_stays_one_of_python(tmp_path):
    """dask_jobqueue lets it end the process with status 0, without a word."""
    pytest.importorskip("dask_jobqueue")
    code = (
        "import signal; from bort.cluster import _import_job_queues; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
        "_import_job_queues(); print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_queue_without_its_commands_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue")
    queue = tmp_path / "queue.yaml"
    queue.write_text("jobs: 1\ncores: 1\nmemory: 1GB\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"^--cluster pbs:{queue}: there is no command qsub here"):
        Cluster(f"pbs:{queue}", str(tmp_path))


@pytest.mark.distributed
def test_the_job_file_of_training(slurm, tmp_path):
    pytest.importorskip("horovod.mxnet")
    write_data(tmp_path)
    flags = arguments(tmp_path, ckpt_dir=tmp_path / "run", num_steps=4)
    job = submit(slurm, str(ROOT / "scripts/slurm/train.sbatch"), *flags)
    wait_until(lambda: ended(job), seconds=100)
    log = (slurm / "slurm.log").read_text()
    assert (tmp_path / "run" / "checkpoint_last").is_dir(), log
