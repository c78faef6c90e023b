"""Runs the tests in fresh environments, one for each Python and torch: ``make versions``.

    make versions ARGS="--session 'tests-3.11(oldest)'"  one of them, about 3 GB; --list: all
    make versions ARGS="... -- tests/kernels"            arguments for pytest; the environment stays

Pythons that are not installed are skipped. docs/install.md lists the versions that have passed.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

# The first torch that works on each Python, and not before the one of pyproject.toml. (2.5.0 has
# wheels for 3.13, but its torch.save fails there.)
OLDEST = {"3.10": "2.4.0", "3.11": "2.4.0", "3.12": "2.4.0", "3.13": "2.6.0"}
NEEDED = ["pytest>=8", "pytest-xdist>=3", "hypothesis", "scikit-learn", "matplotlib", "tqdm"]
# What has no bearing on versions, or has an environment of its own, takes most of the time.
LEFT_OUT = ["emulator", "bench", "packaging", "kernels/test_kernels.py"]
# torch.compile and exports are promised, and tested, from torch 2.13 on.
NEWER = ["torch/test_compile.py", "torch/test_export.py"]
NEWER_NAMES = "compile export one_graph dynamic_shapes hooks_on_saving ecosystem deterministic_mode"


def _run(session: nox.Session, packages: list[str], *arguments: str) -> None:
    core = {"SNNLSTM_CORE": "on", "SNNLSTM_CUDA": "off"}
    session.install(*NEEDED, *packages, env=core)
    session.run("python", "-m", "snnlstm")
    session.run("pytest", "-q", *(session.posargs or arguments))
    if not session.posargs:
        session.run("rm", "-r", session.virtualenv.location, external=True)


@nox.session(python=list(OLDEST))
@nox.parametrize("torch", ["oldest", "newest"], ids=["oldest", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """The suite; the oldest torch with NumPy 1 where it has wheels, the newest with the newest."""
    ignored = [f"--ignore=tests/{name}" for name in LEFT_OUT]
    if torch == "newest":
        _run(session, ["numpy>=2", "snntorch==1.0.0", "-e", ".[integrations]"], *ignored)
        return
    numpy = "numpy>=2" if session.python == "3.13" else "numpy<2"
    ignored += [f"--ignore=tests/{name}" for name in NEWER]
    chosen = " and ".join(f"not {name}" for name in NEWER_NAMES.split())
    packages = [f"torch=={OLDEST[session.python]}", numpy, "snntorch==1.0.0", "-e", "."]
    _run(session, packages, *ignored, "-k", chosen)


@nox.session
def older_snntorch(session: nox.Session) -> None:
    """What meets snnTorch, with the release before the newest."""
    files = ["cell/test_surrogate.py", "snntorch/test_swap.py", "snntorch/test_drop_in.py"]
    named = [f"tests/{name}" for name in [*files, "bench/test_networks.py"]]
    _run(session, ["snntorch==0.9.4", "-e", "."], *named, "-k", "not a_checkpoint_loads")
