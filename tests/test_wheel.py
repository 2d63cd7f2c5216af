"""The wheel, built and installed away from the repository, does what its documentation begins with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from launching import ROOT, environment, free_port, losses

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "rosa_ds", "kernels", "launch", "ds_configs")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def done(*command: str, cwd: Path, status: int = 0, **variables: str) -> str:
    """Output of a command that sees nothing of the repository; AssertionError with it on another exit status."""
    known = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=known | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ended.returncode == status, ended.stdout[-6000:]
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from an sdist, as ``python -m build`` does it; of a copy, since setuptools takes what an earlier build has left."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "clone").mkdir()
    for name in SOURCES:
        source, target = ROOT / name, folder / "clone" / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copyfile(source, target)
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    done(sys.executable, "-W", "ignore", "-c", build, cwd=folder / "clone")
    (sdist,) = folder.glob("*.tar.gz")
    done(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(sdist), cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment with the wheel. Its dependencies are those of this one, behind its own packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = str(folder / "bin" / "python")
    done(*PIP, "--python", python, "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    own = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # no .pth file of these folders is read, so that an editable installation of the repository does not come with them
    shared = dict.fromkeys(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    (own / "dependencies.pth").write_text("".join(f"{path}\n" for path in shared))
    return folder / "bin"


def test_the_wheel_has_the_package_and_what_init_writes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"rosa_ds", "rosa_kernels"}
    start = "rosa_ds/commands/starting_point/"
    for place, source in (("ds_configs", "ds_configs"), ("recipes", "launch/recipes"), ("slurm", "launch/slurm")):
        expected = {path.name: path.read_bytes() for path in (ROOT / source).glob("*.[js]*")}
        assert expected
        inside = f"{start}{place}/"
        assert {name[len(inside) :]: data for name, data in files.items() if name.startswith(inside)} == expected
    assert "rosa_ds/models/tiny/model.safetensors" in files
    assert sum(map(len, files.values())) < 8e6


def test_a_first_run_without_a_clone(binaries: Path, tmp_path: Path) -> None:
    rosa_ds, python = str(binaries / "rosa-ds"), str(binaries / "python")
    places = json.loads(
        done(
            python, "-c", "import json, rosa_ds, rosa_kernels; print(json.dumps([rosa_ds.__file__, rosa_kernels.__file__]))",
            cwd=tmp_path,
        )
    )  # fmt: skip
    assert all(Path(place).is_relative_to(binaries.parent) for place in places)

    done(rosa_ds, "init", "start", cwd=tmp_path)
    start = tmp_path / "start"
    short = ("--data.train", "builtin:sql[:64]", "--data.eval", "builtin:sql[:16]", "--mask.warmup_steps", "1")
    done(rosa_ds, "train", "--config", "ds_configs/zero2.json", *short, "--training.max_steps", "3", cwd=start)
    run = start / "runs" / "default"
    assert [event for _, event, _ in losses(run)].count("train") == 5  # the step of warm-up, that of collecting, three
    assert "verification" in done(rosa_ds, "export", "runs/default", "out", "--verify", cwd=start)
    AutoModelForCausalLM.from_pretrained(start / "out")
    evaluation = ("--data", "builtin:sql[:16]", "--metric", "perplexity", "--output", "result.json")
    done(rosa_ds, "eval", "runs/default", *evaluation, cwd=start)
    *_, (_, event, loss) = losses(run)
    assert event == "eval"
    assert json.loads((start / "result.json").read_text())["loss"] == pytest.approx(loss, rel=1e-6)

    said = done(rosa_ds, "plan", "tiny", "--gpus", "2", cwd=start)
    assert "deepspeed --num_gpus 2 --module rosa_ds.commands.train --config ds_configs/zero" in said
    assert "rosa-ds init" not in said  # the file that the command names is there
    assert "exit status 75" in done(rosa_ds, "doctor", "--status", "75", cwd=start)


def test_launchers_and_slurm_start_it_without_a_clone(binaries: Path, tmp_path: Path) -> None:
    done(str(binaries / "python"), "-m", "rosa_ds", "init", str(tmp_path / "start"), cwd=tmp_path)
    start, torchrun = tmp_path / "start", ("-m", "torch.distributed.run", "--nproc_per_node=2")
    done(
        str(binaries / "python"), *torchrun, f"--master_port={free_port()}", "-m", "rosa_ds.commands.train",
        *("--config", "recipes/tiny_sql.json", "--data.train", "builtin:sql[:64]", "--data.eval", "builtin:sql[:16]"),
        *("--method", "lora", "--training.max_steps", "2"),
        cwd=start,
    )  # fmt: skip
    assert (start / "runs" / "tiny_sql" / "adapter").is_dir()

    # what SLURM has of its own, for a job of one node and one task
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    for name, script in (("scontrol", "echo localhost"), ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')):
        (slurm / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (slurm / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(start), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "1"}
    job |= {"SLURM_JOB_NODELIST": "localhost", "RANKS_PER_NODE": "1", "VENV": str(binaries.parent)}
    job |= {
        "PATH": f"{slurm}{os.pathsep}{environment()['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
    }
    (start / "sweep.txt").write_text("--adapter.rank 4 --dry-run\n")
    said = done("bash", "slurm/array.sbatch", "sweep.txt", "--config", "ds_configs/zero2.json", cwd=start, **job)
    assert "a rank of 1" in said
    assert "7_1" in said
    done("bash", "slurm/export.sbatch", "runs/tiny_sql", "out", cwd=start, **job)
    assert (start / "out" / "model.safetensors").is_file()
