"""The tests in fresh environments, one for each Python and torch: ``make versions``.

    make versions                                       every environment, about 3 GB each
    make versions ARGS="--session 'tests-3.11(oldest)'"  one of them; --list names all
    make versions ARGS="... -- tests/kernels"            arguments for pytest; the environment stays

Pythons that are not installed are left out. An environment is removed when its tests have passed.
What README.md and pyproject.toml promise is what has passed.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "without_snntorch", "older_snntorch"]

# The first torch that works on each Python, and not before the one of pyproject.toml. (2.5.0 has
# wheels for 3.13, but its torch.save fails there.)
OLDEST = {"3.10": "2.4.0", "3.11": "2.4.0", "3.12": "2.4.0", "3.13": "2.6.0", "3.14": "2.9.0"}
CORE = {"SNNLSTM_CORE": "on", "SNNLSTM_CUDA": "off"}
NEEDED = ["pytest>=8", "pytest-xdist>=3", "hypothesis==6.168.5", "pybind11>=2.13"]
NEEDED += ["scikit-learn", "matplotlib", "tqdm"]
# What has no bearing on versions, or has an environment of its own, takes most of the time.
LEFT_OUT = [
    f"--ignore=tests/{name}"
    for name in (
        "simt", "bench", "kernels/test_kernels.py",
        "packaging/test_cross.py", "packaging/test_distribution.py",
    )
]  # fmt: skip

# torch.compile and exports are promised, and tested, from torch 2.13 on.
NEWER = [f"--ignore=tests/torch/{name}.py" for name in ("test_compile", "test_export")]
NEWER += [
    "-k",
    "not compile and not export and not one_graph and not dynamic_shapes and not hooks_on_saving "
    "and not ecosystem and not deterministic_mode",
]


def _install(session: nox.Session, torch: str, numpy: str, snntorch: str | None) -> None:
    wanted = [f"torch=={OLDEST[session.python]}" if torch == "oldest" else "torch"]
    wanted += [f"numpy{numpy}", f"snntorch=={snntorch}" if snntorch else ""]
    extra = "[integrations]" if torch == "newest" and snntorch else ""
    session.install(*filter(None, wanted), *NEEDED, "-e", f".{extra}", env=CORE)
    session.run("python", "tools/one_step.py")


def _remove(session: nox.Session) -> None:
    """Remove the environment; with --install-only nox runs nothing, and it stays."""
    session.run("rm", "-r", session.virtualenv.location, external=True)


def _test(session: nox.Session, *arguments: str) -> None:
    session.run("pytest", "-q", *(session.posargs or arguments))
    if not session.posargs:
        _remove(session)


@nox.session(python=list(OLDEST))
@nox.parametrize("torch", ["oldest", "newest"], ids=["oldest", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """The suite; the oldest torch with NumPy 1 where it has wheels, the newest with the newest."""
    numpy = "<2" if torch == "oldest" and session.python in ("3.10", "3.11", "3.12") else ">=2"
    _install(session, torch, numpy, snntorch="1.0.0")
    _test(session, *LEFT_OUT, *(NEWER if torch == "oldest" else []))


@nox.session
def without_snntorch(session: nox.Session) -> None:
    """Import and one step, with no snnTorch in the environment."""
    _install(session, "newest", ">=2", snntorch=None)
    session.run("python", "-m", "snnlstm")
    _remove(session)


@nox.session
def older_snntorch(session: nox.Session) -> None:
    """What meets snnTorch, with the release before the newest."""
    _install(session, "newest", ">=2", snntorch="0.9.4")
    files = ("cell/test_surrogate", "snntorch/test_swap", "snntorch/test_drop_in")
    named = [f"tests/{name}.py" for name in files]
    _test(session, "tests/networks", *named, "-k", "not a_checkpoint_loads")
