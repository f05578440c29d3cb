"""The commands of docs/cluster.md as they stand, on small configurations of the same names and with fewer processes.

Small programs stand for those of SLURM: sbatch starts all tasks of an array at once, and srun one task for each of two nodes.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import pages
from helpers.tiny_runs import write_config

from vismt.report.results import RESULTS, read_results

PAGE = pages.ROOT / "docs" / "cluster.md"
CONFIGS = {
    "multitask": "multitask/emtal_small",
    "fewshot": "fewshot/cross_domain",
    "lm": "lm/forgetting",
    "dense": "dense/nyuv2",
}
SBATCH = """\
import re, subprocess, sys, os
words = sys.argv[1:]
if "--wrap" in words:                   # after the array of a dependency
    (number,) = (word.rpartition(":")[2] for word in words if word.startswith("--dependency=afterok:"))
    code = 'while [ ! -e "$0" ]; do sleep 0.2; done; exec sh -c "$1"'
    sys.exit(subprocess.run(["bash", "-c", code, f"job-{number}", words[words.index("--wrap") + 1]]).returncode)
script = open(words[-1]).read()
first, last = map(int, re.search(r"^#SBATCH --array=(\\d+)-(\\d+)", script, re.M).groups())
if os.path.exists("job-7"):
    os.remove("job-7")
code = 'for task in $(seq "$1" "$2"); do SLURM_CPUS_PER_TASK=1 SLURM_ARRAY_TASK_ID=$task bash -e "$3" & '
code += 'done; wait; touch job-7'
with open("array.log", "w") as log:
    subprocess.Popen(["bash", "-c", code, "bash", str(first), str(last), words[-1]], stdout=log, stderr=log)
print(7)
"""
PROGRAMS = {
    "vismt": 'exec "$PYTHON" -m vismt.cli "$@"',
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"',
    "accelerate": 'exec "$PYTHON" -m accelerate.commands.accelerate_cli "$@"',
    "python": 'exec "$PYTHON" "$@"',
    "sbatch": 'exec "$PYTHON" "$(dirname "$0")/sbatch.py" "$@"',
    "scontrol": 'printf "localhost\\nother\\n"',
    "srun": '"$@" & one=$!; "$@" & wait $one && wait $!',
}


class Room:
    """A folder with the configurations that the page names, in small, and the programs that it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "shared" / "runs"
        for job, name in CONFIGS.items():
            source = write_config(job, folder)
            config = yaml.safe_load(source.read_text())
            config["arms"] = {"one": {}, "other": {"adapt.rank": 3}}
            config["train"] |= {"warmup": 2}
            for path in (folder / "configs" / f"{name}.yaml", folder / name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(yaml.safe_dump(config))
        programs = folder / "bin"
        programs.mkdir()
        (programs / "sbatch.py").write_text(SBATCH)
        for name, body in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(stat.S_IRWXU)

    def run(self, script: str, **variables: str) -> str:
        """Run a script of the page with its folders, hashes and numbers of processes; return what it printed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        script = script.replace("/shared/runs", str(self.runs)).replace(":29500", f":{port}")
        script = re.sub(r"(--nproc-per-node|--num_processes) 8", r"\1 2", script).replace("array=1-16", "array=1-2")
        script = script.replace("TASK_ID/16", "TASK_ID/2").replace(
            "--nnodes 2 --nproc-per-node 2", "--nnodes 2 --nproc-per-node 1"
        )
        for path in self.folder.glob("runs/*"):
            name = path.name.rpartition("-")[0]
            script = script.replace(f"{name}-HASH", path.name)
        common = {
            **os.environ,
            "PYTHON": sys.executable,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(pages.ROOT), str(pages.ROOT / "tests")]),
            "PET_MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        ran = subprocess.run(
            ["bash", "-ec", script],
            cwd=self.folder,
            env=common | variables,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert ran.returncode == 0, f"{script}\n{ran.stdout[-1000:]}\n{ran.stderr[-3000:]}"
        return ran.stdout


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def scripts(heading: str) -> list[str]:
    return [block.code for block in pages.blocks(PAGE, "bash", heading)]


def results(out: Path, name: str) -> int:
    """Return the number of rows of the only run of a name."""
    (folder,) = out.glob(f"{name}-*")
    assert (folder / "report.html").exists()
    return len(read_results(folder / RESULTS, folder.name.rpartition("-")[2]))


@pytest.mark.slow
def test_a_slurm_array(room: Room) -> None:
    script, submit, _ = scripts("A SLURM job array")
    (room.folder / "study.sbatch").write_text(script.replace("/shared", str(room.folder / "shared")))
    (room.folder / "shared" / "data").mkdir(parents=True)
    shown = room.run(submit.replace("-HASH", "-*"), VISMT_DATA="")
    assert f"report  {room.runs}/emtal_small-" in shown and results(room.runs, "emtal_small") > 0


@pytest.mark.slow
def test_torchrun_on_one_and_two_nodes(room: Room) -> None:
    one, nodes, _ = scripts("torchrun")
    room.run(one)
    assert results(room.folder / "runs", "cross_domain") > 0
    room.run(nodes.replace("cross_domain.yaml", "cross_domain.yaml --out nodes"))
    (run,) = (room.folder / "nodes").iterdir()
    assert '"processes": 2' in (run / "run.json").read_text()
    assert results(room.folder / "nodes", "cross_domain") > 0


@pytest.mark.slow
def test_accelerate_launch_and_fsdp(room: Room) -> None:
    (launch,) = scripts("accelerate launch")
    room.run(launch)
    assert results(room.folder / "runs", "forgetting") > 0
    settings, *_ = pages.blocks(PAGE, "yaml")
    (room.folder / "fsdp.yaml").write_text(settings.code.replace("num_processes: 8", "num_processes: 2"))
    (train,) = (block.code for block in pages.blocks(PAGE, "bash") if "fsdp.yaml" in block.code)
    room.run(train.rstrip() + " --out sharded")
    assert [*(room.folder / "sharded").glob("forgetting-*/arms/*/*/adapter")]
