"""Rules of the project that a machine can check."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rosa_ds

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rosa_ds", "kernels", "launch", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

PACKAGED = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("rosa_ds", "kernels")]


def python(*arguments: str, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def names_of(node: ast.AST) -> set[str]:
    """What a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imported_names(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in names_of(node)}


QUIET = ("transformers", "bitsandbytes", "peft")


def test_the_folder_kernels_is_nobodys_package(tmp_path: Path) -> None:
    """Libraries that look for Hugging Face's ``kernels`` from the repository's root find it, or quietly nothing."""
    imports = f"import {', '.join(QUIET)}, rosa_kernels"
    said = subprocess.run(
        [sys.executable, "-c", imports], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    assert said.stdout + said.stderr == ""
    genuine = tmp_path / "kernels"
    genuine.mkdir()
    (genuine / "__init__.py").write_text("genuine = True")
    script = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.genuine)"
    assert python("-c", script, cwd=ROOT) == "True"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("run_path('launch/train.py'", []),
        ("run_module('rosa_ds.commands.train'", []),
        ("run_module('rosa_ds'", ["train"]),
        ("run_module('rosa_ds'", []),
    ],
    ids=["file", "module", "command", "dispatcher"],
)
def test_help_and_wrong_settings_do_not_wait_for_torch(program: str, words: list[str]) -> None:
    def ended(*arguments: str) -> str:
        script = (
            f"import runpy, sys\nsys.argv[1:] = {[*words, *arguments]}\n"
            f"try:\n    runpy.{program}, run_name='__main__')\n"
            "except SystemExit as end:\n    status = end.code\n"
            "print(int(status or 0), {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules))"
        )
        return python("-c", script, cwd=ROOT).splitlines()[-1]

    assert ended("--help") == "0 set()"
    assert ended("--adapter.rnk") == "1 set()"


def test_every_public_name_is_there() -> None:
    script = "import rosa_ds; [getattr(rosa_ds, name) for name in rosa_ds.__all__]; print(set(rosa_ds.__all__) - set(dir(rosa_ds)))"
    assert python("-c", script, cwd=ROOT) == "set()"


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse((ROOT / "rosa_ds" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == rosa_ds._PLACES


@pytest.mark.parametrize("folder", ["launch", "benchmarks"])
def test_programs_shadow_no_package(folder: str) -> None:
    """The folder of a program is the first of its ``sys.path``."""
    names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    known = {*sys.stdlib_module_names, *packages_distributions(), "evaluate", "kernels", "triton"}
    assert not names & known


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_rules(path: Path) -> None:
    text, names = path.read_text(), imported_names(path)
    where = path.relative_to(ROOT).as_posix()
    if not where.startswith(("rosa_ds/distributed/", "rosa_ds/zero/")):
        assert not any(name.startswith("torch.distributed") for name in names)
    if where not in ("rosa_ds/models/pretrain_tiny.py", "rosa_ds/config/command_line.py"):
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), "use the logger"
    assert not re.search(r"except( Exception)?:\s*pass", text)
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "say what the file is for"


def test_kernels_need_nothing_of_the_training_system() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] in ("rosa_ds", "deepspeed", "transformers") for name in imported_names(path))


distributions = functools.cache(packages_distributions)


def declared(*extras: str) -> set[str]:
    """Names of the distributions that pyproject.toml asks for."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]
    return {Requirement(each).name.replace("-", "_") for each in wanted}


EXTRAS = ("gpu", "quantization", "tensorboard", "plots", "compare", "evaluation", "lm-eval", "classification")


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_declared(path: Path) -> None:
    """What a module needs to be imported is installed with the package; what a function imports may be an extra."""
    at_import = {name for node in ast.parse(path.read_text()).body for name in names_of(node)}
    if path.name == "triton_kernel.py":  # imported where Triton is there
        at_import = set()
    with_it = ["compare"] if path.parent.name == "comparing" else []
    for names, known in ((at_import, declared(*with_it)), (imported_names(path), declared(*EXTRAS))):
        for module in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "rosa_ds", "rosa_kernels"}:
            found = {module, *(name.replace("-", "_") for name in distributions().get(module, ()))}
            assert known & found, f"{module} is no dependency in pyproject.toml"


PRIVATE = re.compile(
    r"\bds_(id|shape|numel|tensor|persist|status|process_group|zero_partition\w*)\b|_hp_mapping|_z3_optimizer|fp32_partitioned"
    r"|averaged_gradients|grad_partitions|ipg_buckets|round_robin_bit16|GatheredParameters|deepspeed_allreduce_buffer"
)
"""Names inside DeepSpeed, which change with its versions."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_deepspeed_is_read_in_one_place(path: Path) -> None:
    """``rosa_ds/zero`` alone imports DeepSpeed and names what is inside it; benchmarks build an engine of their own."""
    where = path.relative_to(ROOT).as_posix()
    if where.startswith("rosa_ds/zero/"):
        return
    if where != "benchmarks/step_time.py":
        assert not any(name.split(".")[0] == "deepspeed" for name in imported_names(path))
    assert not PRIVATE.search(path.read_text())
