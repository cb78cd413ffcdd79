"""The whole test suite on every supported torch and Python, and the built package in an empty environment.

``make matrix`` runs ``nox -s tests``, ``make dist`` runs ``nox -s dist installed``. What follows ``--`` goes to pytest:

    nox -s "tests-3.11(torch='2.14.1')" -- tests/curvature -n 2
    TORCH_NIGHTLY_INDEX=... nox -s nightly-3.11

Each environment installs ``constraints.txt`` but for torch. An index of CPU builds saves gigabytes where there is one:
name it in the environment variable ``PIP_EXTRA_INDEX_URL``.
"""

import os
import shutil
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
#: The newest patch of every minor release that is supported; the first is the lower bound in pyproject.toml.
TORCH = ["2.13.0", "2.14.1"]
PYTHON = ["3.11", "3.12", "3.13"]
PINNED = next(
    line.removeprefix("torch==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)

nox.needs_version = ">=2026.10"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False  # those that are not here are skipped, and listed as such
nox.options.sessions = ["tests"]


def constraints(session: nox.Session, torch: str | None = None) -> str:
    """A file with the pinned versions and this torch; with any torch if None."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("torch==")]
    path = Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join(kept + ([f"torch=={torch}"] if torch else [])) + "\n")
    return str(path.resolve())


def run_suite(session: nox.Session) -> None:
    """Says what is tested, and tests it."""
    session.env["OMP_NUM_THREADS"] = "1"
    session.run("python", "-c", "import sys, torch; print(sys.version, torch.__version__)")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHON)
@nox.parametrize("torch", TORCH)
def tests(session: nox.Session, torch: str) -> None:
    """The test suite on one torch."""
    session.install("--constraint", constraints(session, torch), f"torch=={torch}", "--editable", ".[dev]")
    run_suite(session)


@nox.session(python=PYTHON)
def nightly(session: nox.Session) -> None:
    """The test suite on the newest build of torch, from the index in TORCH_NIGHTLY_INDEX."""
    index = os.environ.get("TORCH_NIGHTLY_INDEX")
    if not index:
        session.error("TORCH_NIGHTLY_INDEX is not set: set it to the address of an index of nightly builds of torch")
    session.install("--constraint", constraints(session), "--editable", ".[dev]")
    session.install("--pre", "--upgrade", "--index-url", index, "torch")
    run_suite(session)


@nox.session(python=PYTHON[0])
def laplace(session: nox.Session) -> None:
    """The tests of the backend for laplace-torch, which dev leaves out."""
    pinned = constraints(session, PINNED)
    session.install("--constraint", pinned, f"torch=={PINNED}", "--editable", ".[dev,laplace]")
    # laplace-torch asks for torchvision and does not import it; a build unlike torch's would break torchmetrics.
    session.run("python", "-m", "pip", "uninstall", "--yes", "torchvision")
    session.env["OMP_NUM_THREADS"] = "1"
    session.run("python", "-m", "pytest", "tests/uses", *session.posargs)


@nox.session(python=PYTHON[0])
def dist(session: nox.Session) -> None:
    """Builds the sdist, and from it the wheel, and checks what their metadata would look like to a reader."""
    for left_over in ("build", "dist"):
        shutil.rmtree(ROOT / left_over, ignore_errors=True)
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["release"]
    session.install("--constraint", constraints(session), *requirements)
    session.run("python", "-m", "build")
    session.run("python", "-m", "twine", "check", "--strict", *map(str, sorted((ROOT / "dist").iterdir())))


@nox.session(python=PYTHON[0])
def installed(session: nox.Session) -> None:
    """The wheel in an empty environment, used from another folder: README's examples, and mypy on a user's file."""
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        session.error(f"dist/ holds {len(wheels)} wheels where one was expected: run nox -s dist first")
    session.install("--constraint", constraints(session, PINNED), f"{wheels[0]}[sb3,examples]", "mypy")
    session.install("--force-reinstall", "--no-deps", str(wheels[0]))  # with nox -r, a wheel of the same version
    session.env["OMP_NUM_THREADS"] = "1"
    elsewhere = Path(session.create_tmp()) / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir()
    session.chdir(elsewhere)
    session.run("python", "-P", str(ROOT / "tests" / "check_installed.py"), str(ROOT / "README.md"))
