"""A copy of the tree for tests of a changed crate, built beside the crate itself, whose dependencies are its own."""
import os, re, shutil, subprocess, sys

here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def copy(name):
    """Copies the tree to target/`name`, under a version of its own so that nobody takes one for the other."""
    to = os.path.join(here, "target", name)
    for folder in ["src", "tests", "fuzz", "examples", "benches"]:
        shutil.rmtree(os.path.join(to, folder), ignore_errors=True)
        skip = shutil.ignore_patterns("target", "artifacts", "corpus")
        shutil.copytree(os.path.join(here, folder), os.path.join(to, folder), ignore=skip)
    for file in ["Cargo.toml", "Cargo.lock", "README.md"]:
        shutil.copy(os.path.join(here, file), to)
    replace(to, "Cargo.toml", r'(?m)^version = ".*"', f'version = "0.0.0-{name}"')
    return to


def replace(folder, path, pattern, by):
    """Replaces the first match of `pattern`, which must be there."""
    path = os.path.join(folder, path)
    text, n = re.subn(pattern, lambda _: by, open(path).read(), count=1)
    if n != 1:
        sys.exit(f"`{pattern}` not in {path}")
    open(path, "w").write(text)


def build(folder, programs, options):
    """Builds test programs of a copy and says where each lies."""
    command = ["cargo", "test", "--no-run", *options]
    for program in programs:
        command += ["--test", program]
    target = os.path.join(here, os.environ.get("CARGO_TARGET_DIR", "target"))
    env = dict(os.environ, CARGO_TARGET_DIR=target)
    log = subprocess.run(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    if log.returncode != 0:
        sys.exit(log.stderr)
    found = {p: re.search(rf"tests/{p}\S* \((.*)\)", log.stderr).group(1) for p in programs}
    return {p: os.path.join(folder, path) for p, path in found.items()}
