"""Rules of the project that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rosa_ds", "kernels", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OUTSIDE = "import importlib.util, sys; spec = importlib.util.find_spec('kernels'); print(spec.origin if spec else None)"


def python(*arguments: str, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_kernels_is_not_our_folder_where_the_package_is_installed(tmp_path: Path) -> None:
    """Installed, from a launch script and inside the tests, the name belongs to whoever else has it."""
    assert python("-c", OUTSIDE, cwd=tmp_path) == "None"
    assert (
        python("-c", "import rosa_kernels; print(rosa_kernels.sddmm.__module__)", cwd=tmp_path)
        == "rosa_kernels.sddmm.op"
    )
    probe = tmp_path / "probe.py"
    probe.write_text(f"import sys; sys.path[0] = {str(ROOT / 'launch')!r}\n{OUTSIDE}\n")
    assert python(str(probe), cwd=ROOT) == "None"
    assert not any(Path(entry or ".").resolve() == ROOT for entry in sys.path)


def test_kernels_gives_the_name_back_in_the_root(tmp_path: Path) -> None:
    """`python` started in the root finds the folder first; Hugging Face's package must still be what one gets."""
    assert python("-c", "import kernels; print(hasattr(kernels, 'sddmm'))", cwd=ROOT) == "False"
    assert python("-c", "import transformers, rosa_ds; print('imported')", cwd=ROOT).endswith("imported")
    genuine = tmp_path / "kernels"
    genuine.mkdir()
    (genuine / "__init__.py").write_text("genuine = True")
    script = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.genuine)"
    assert python("-c", script, cwd=ROOT) == "True"


def test_help_and_wrong_settings_do_not_wait_for_torch() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', {argument!r}]\n"
        "try:\n    runpy.run_path('launch/train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print(int(status or 0), {{'torch', 'transformers', 'deepspeed', 'datasets'}} & set(sys.modules))"
    )
    assert python("-c", script.format(argument="--help"), cwd=ROOT).splitlines()[-1] == "0 set()"
    assert python("-c", script.format(argument="--adapter.rnk"), cwd=ROOT).splitlines()[-1] == "1 set()"


def test_every_public_name_is_there() -> None:
    script = "import rosa_ds; [getattr(rosa_ds, name) for name in rosa_ds.__all__]; print(set(rosa_ds.__all__) - set(dir(rosa_ds)))"
    assert python("-c", script, cwd=ROOT) == "set()"


def test_launch_scripts_shadow_no_package() -> None:
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    installed = {name for name in sys.stdlib_module_names} | {"datasets", "evaluate", "triton", "torch", "transformers"}
    assert not names & installed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_rules(path: Path) -> None:
    text, names = path.read_text(), imported_names(path)
    where = path.relative_to(ROOT).as_posix()
    assert len(text.splitlines()) <= 400, "split the file"
    longest = 100 if where.startswith("kernels/") else 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < longest, f"split {node.name}"
    if not where.startswith("rosa_ds/distributed/"):
        assert not any(name.startswith(("torch.distributed", "deepspeed.comm")) for name in names)
        assert "GatheredParameters" not in text
    if where not in ("rosa_ds/models/pretrain_tiny.py", "rosa_ds/cli.py"):
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), "use the logger"
    assert not re.search(r"except( Exception)?:\s*pass", text)
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "say what the file is for"


def test_kernels_need_nothing_of_the_training_system() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] in ("rosa_ds", "deepspeed", "transformers") for name in imported_names(path))


def test_readme_lists_every_file() -> None:
    """The tree in the README: folders end in a slash, names of one line are parted by commas, two spaces before the text."""
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    folders: list[str] = []
    listed = set()
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            if name.endswith("/"):
                folders = [*folders[:depth], name.rstrip("/")]
            else:
                listed.add("/".join([*folders[:depth], name]))
    files = {path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"}
    assert listed == files


def test_every_package_is_in_the_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for path in SOURCES:
        if path.name == "__init__.py":
            parts = path.parent.relative_to(ROOT).as_posix().replace("/", ".").replace("kernels", "rosa_kernels", 1)
            name = parts if parts.startswith("rosa") else f"rosa_{parts}"
            assert f'"{name}"' in text
