"""What `scripts/image.sh` runs: the image, built to its end and run as its users run it; a line for each case.

The line has the seconds and what the container said. RunPod and the hub are the tests' stand-ins, on this machine.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import src
from tests.hub import Hub, Repo
from tests.runpod_stand_in import JobRecord, StandIn

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "models" / "flux-shapes"
BUDGET = ROOT / "scripts" / "image-budget.json"
TORCH = os.environ.get("TORCH", "cpu")  # the build argument
IMAGE, BAKED, BASE = (f"flux-worker-test-{name}" for name in (TORCH, "baked", "base"))
TOKEN = "hf_inTheHubOfTheTests"
WORKER = 10001  # the user that the worker becomes
# What made a layer, and what it is called in the budget; the first that fits.
LAYERS = {
    "apt-get install": "system", "--default-index": "torch", "runtime.txt": "packages", "COPY models": "models",
    "COPY": "code", "": "rest",
}  # fmt: skip
_TORCH_PORT = 8790  # always the same: it is a build argument, and another one would build torch's layer anew
ENDLESS = {"prompt": "a red circle", "num_inference_steps": 100, "num_images": 4}
SMALL = ("--prompt", "a red star", "--width", "128", "--height", "128", "--quiet")


class Failed(Exception):
    """A case that does not hold, and what was seen instead."""


def check(holds: object, seen: str) -> None:
    """Raise Failed with what was `seen` unless it `holds`."""
    if not holds:
        raise Failed(seen)


class Tool:
    """The command line of docker; `build_options` are what builds want on this machine."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.build_options: list[str] = []
        self.environment = {**os.environ, "DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain"}

    def __call__(self, *arguments: str, seconds: float = 900, **more: str) -> str:
        """What the command wrote; raises Failed with its end where it fails."""
        done = self.attempt(*arguments, seconds=seconds, **more)
        check(done.returncode == 0, f"{shlex.join(arguments[:3])}: {done.stdout[-3000:]}")
        return done.stdout

    def attempt(self, *arguments: str, seconds: float = 900, **more: str) -> subprocess.CompletedProcess[str]:
        """The command's end, whatever it is."""
        return subprocess.run(
            [self.command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            cwd=ROOT,
            env={**self.environment, **more},
            timeout=seconds,
            check=False,
        )

    def build(self, tag: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A build of this folder."""
        return self.attempt("build", *self.build_options, *options, "-t", tag, ".", seconds=1800, **environment)


class Container:
    """One container from its start until it is removed."""

    numbers = itertools.count(1)

    def __init__(self, tool: Tool, *words: str) -> None:
        self.name = f"{IMAGE}-{os.getpid()}-{next(self.numbers)}"
        self._tool = tool
        tool("run", "--detach", "--name", self.name, *words)

    def logs(self) -> str:
        return self._tool("logs", self.name)

    def line(self, text: str) -> str:
        """The last line of the log that holds `text`."""
        lines = [line for line in self.logs().splitlines() if text in line]
        check(lines, f"no line with {text!r}: {self.logs()[-2000:]}")
        return lines[-1].strip()

    def wait_for(self, text: str, seconds: float = 180) -> str:
        """The line that holds `text`, as soon as it is there."""
        deadline = time.monotonic() + seconds
        while text not in self.logs():
            check(self.running() and time.monotonic() < deadline, f"no {text!r}: {self.logs()[-2000:]}")
            time.sleep(0.2)
        return self.line(text)

    def running(self) -> bool:
        return self._tool("inspect", "--format", "{{.State.Running}}", self.name).strip() == "true"

    def execute(self, *command: str) -> str:
        return self._tool("exec", self.name, *command)

    def wait(self, seconds: float = 300) -> int:
        """The exit status."""
        return int(self._tool("wait", self.name, seconds=seconds).split()[-1])

    def terminate(self) -> tuple[int, float]:
        """SIGTERM; the exit status, and after how many seconds the container had ended."""
        begun = time.time()
        self._tool.attempt("kill", "--signal", "TERM", self.name)
        status = self.wait()
        ended = json.loads(self._tool("inspect", "--format", "{{json .State.FinishedAt}}", self.name))
        return status, datetime.fromisoformat(ended).timestamp() - begun

    def remove(self) -> None:
        self._tool.attempt("rm", "--force", self.name)


@dataclass
class Machine:
    """What the cases work with."""

    tool: Tool
    stand_in: StandIn
    hub: Hub
    folder: Path  # of this run
    volumes: list[str]

    def volume(self) -> str:
        """A new volume, empty and root's; gone with the run."""
        self.volumes.append(f"{IMAGE}-{os.getpid()}-{len(self.volumes)}")
        self.tool("volume", "create", self.volumes[-1])
        return self.volumes[-1]

    @contextmanager
    def container(self, *words: str) -> Iterator[Container]:
        """A container of `words`, as `docker run` takes them."""
        held = Container(self.tool, *words)
        try:
            yield held
        finally:
            held.remove()

    @contextmanager
    def worker(self, *options: str, **environment: str) -> Iterator[Container]:
        """A worker under the stand-in for RunPod."""
        settings = {k: v for k, v in self.stand_in.environment().items() if k.startswith("RUNPOD_")}
        settings |= {"MODEL_NAME": "flux-shapes", **environment}
        variables = [word for name, value in settings.items() for word in ("--env", f"{name}={value}")]
        with self.container("--network", "host", *variables, *options, IMAGE) as held:
            yield held

    def job(self, container: Container, **fields: Any) -> JobRecord:
        """One job's end, by the worker in `container`."""
        id = self.stand_in.submit(**{"prompt": "a red circle", **fields})
        deadline = time.monotonic() + 180
        while not self.stand_in.jobs[id].results:
            check(time.monotonic() < deadline, f"no result: {container.logs()[-2000:]}")
            if not container.running():
                raise Failed(f"the container ended: {container.logs()[-2000:]}")
            time.sleep(0.1)
        job = self.stand_in.jobs[id]
        check(job.status == "COMPLETED", f"{job.results[-1][1]}")
        return job


# ---- what this machine has


def call(*command: str) -> str:
    """What a program wrote; raises Failed with its end where it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    check(done.returncode == 0, f"{shlex.join(command[:2])}: {done.stdout[-2000:]}")
    return done.stdout


def base_image(tool: Tool) -> str | None:
    """None where the Dockerfile's own base can be had; otherwise the name of a stand-in that is made of packages.

    It trusts the authorities that this machine trusts: where no hub is reached, a proxy may stand before registries.
    """
    wanted = re.findall(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
    with suppress(subprocess.TimeoutExpired):
        if tool.attempt("pull", "--quiet", f"docker.io/library/{wanted}", seconds=120).returncode == 0:
            return None
    if tool.attempt("image", "inspect", BASE).returncode == 0:
        return BASE
    check(shutil.which("debootstrap"), f"{wanted} cannot be had, and debootstrap, which makes a stand-in, is missing")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        call("debootstrap", "--variant=minbase", "bookworm", str(root))
        own = Path("/usr/local/share/ca-certificates")
        if own.is_dir():
            shutil.copytree(own, root / own.relative_to("/"), dirs_exist_ok=True)
        for file in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")):
            file.unlink()
        bundle = "/etc/ssl/certs/ca-certificates.crt"
        trusted = [f"--change=ENV {name}={bundle}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
        call("tar", "-C", str(root), "-cf", f"{folder}/root.tar", ".")
        tool("import", *trusted, f"{folder}/root.tar", BASE)
    return BASE


def torch_index(stack: ExitStack) -> str | None:
    """An index with this machine's own build of torch without CUDA; None where it has none and PyTorch's is asked."""
    version = importlib.metadata.version("torch")
    if "+" not in version:
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    wanted = ("--dest", str(folder / "torch"), f"torch=={version.partition('+')[0]}")
    call(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *wanted)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", _TORCH_PORT), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return f"http://127.0.0.1:{_TORCH_PORT}"


def has_card() -> bool:
    """Whether containers may have a card."""
    return shutil.which("nvidia-smi") is not None and shutil.which("nvidia-container-cli") is not None


def stop_seconds() -> float:
    """How long a worker without jobs may take to end; on a busy machine the ten after which docker kills it."""
    return 2.0 if os.getloadavg()[0] < 2 * (os.cpu_count() or 1) else 10.0


# ---- the cases


def build(machine: Machine) -> str:
    """To the end, with the labels that it is given."""
    labels = {"VERSION": src.__version__, "REVISION": call("git", "rev-parse", "HEAD").strip()}
    done = machine.tool.build(IMAGE, *(word for k, v in labels.items() for word in ("--build-arg", f"{k}={v}")))
    check(done.returncode == 0, done.stdout[-4000:])
    said = machine.tool("inspect", "--format", "{{json .Config.Labels}}", IMAGE)
    check(all(value in said for value in labels.values()), said)
    return "labels " + ", ".join(labels.values())


def size(machine: Machine) -> str:
    """Megabytes (10^6) of the whole and of each layer, against scripts/image-budget.json."""
    history = machine.tool("history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", IMAGE)
    found = dict.fromkeys(LAYERS.values(), 0.0)
    for row in history.splitlines():
        amount, _, made_by = row.partition("\t")
        found[next(name for text, name in LAYERS.items() if text in made_by)] += float(amount) / 1e6
    found["image"] = sum(found.values())
    budget = json.loads(BUDGET.read_text())[TORCH]
    too_large = {name: round(found[name]) for name, most in budget.items() if found[name] > most}
    check(not too_large, f"{too_large} MB, and {BUDGET.name} allows {budget} with TORCH={TORCH}")
    return ", ".join(f"{name} {megabytes:.0f}" for name, megabytes in found.items()) + " MB"


def build_refused(machine: Machine) -> str:
    """A build argument that means nothing ends the build with a sentence."""
    said = []
    for argument in ("TORCH=gpu", "BAKE_MODEL=maybe"):
        done = machine.tool.build(f"{IMAGE}-refused", "--build-arg", argument)
        found = re.findall(rf"^#\d+ [\d.]+ ({argument}: must be .*)$", done.stdout, re.MULTILINE)
        check(done.returncode != 0 and found, done.stdout[-2000:])
        said += found
    return "; ".join(said)


def job_as_root(machine: Machine) -> str:
    """Started as root it works as user 10001 without more rights, is idle, and ends with 0 by SIGTERM."""
    with machine.worker() as container:
        job = machine.job(container)
        status = container.execute("sh", "-c", _STATUS)
        check(f"Uid:\t{WORKER}\t{WORKER}" in status and "NoNewPrivs:\t1" in status, status)
        zombies(container)
        code, seconds = container.terminate()
        check(
            code == 0 and seconds < stop_seconds(), f"status {code} after {seconds:.2f} s: {container.logs()[-1000:]}"
        )
        return f"{job.status}; SIGTERM while idle: status {code} after {seconds:.2f} s: {container.line('SIGTERM')}"


# The status of the worker's own process: the first whose command is Python's.
_STATUS = "for p in /proc/[0-9]*; do grep -aq '^python' $p/cmdline 2>/dev/null && cat $p/status && break; done"


def zombies(container: Container) -> None:
    """Nothing that has ended is left over, also of what nobody waits for."""
    container.execute("sh", "-c", "(sleep 0.1 &) ; exit 0")
    time.sleep(1)
    states = container.execute("sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null || true")
    left = [line for line in states.splitlines() if re.search(r"\) Z ", line)]
    check(not left, f"zombies: {left}")


def job_as_worker(machine: Machine) -> str:
    """Started as 10001; SIGTERM in mid-job: the job is finished and posted first, and the status is 0."""
    with machine.worker("--user", str(WORKER)) as container:
        machine.job(container)
        id = machine.stand_in.submit(**ENDLESS)
        job = machine.stand_in.jobs[id]
        while not any(posted["step"] for _, posted in job.progress):
            check(container.running(), container.logs()[-2000:])
            time.sleep(0.05)
        code, seconds = container.terminate()
        check(code == 0 and job.status == "COMPLETED", f"status {code}, job {job.status}: {container.logs()[-2000:]}")
        return f"SIGTERM in mid-job: {job.status}, status {code} after {seconds:.1f} s: {container.line('SIGTERM')}"


def terminated(machine: Machine) -> str:
    """SIGTERM at 20 random moments of a start: status 0 within two seconds."""
    moments = random.Random(14)
    ends: list[tuple[float, int, float]] = []
    with machine.worker() as container:
        begun = time.monotonic()
        machine.job(container)
        start = time.monotonic() - begun
    for _ in range(20):
        moment = moments.uniform(0, start)
        with machine.worker() as container:
            time.sleep(moment)
            ends.append((moment, *container.terminate()))
    wrong = [end for end in ends if end[1] or end[2] > stop_seconds()]
    check(not wrong, f"second, status, seconds until the end: {wrong}")
    longest, quick = max(seconds for _, _, seconds in ends), sum(seconds <= 2 for _, _, seconds in ends)
    return f"20 of 20 with status 0, after {longest:.2f} s at most, {quick} within 2 s; a start takes {start:.1f} s"


def read_only(machine: Machine) -> str:
    """A root that nobody can write, with a tmpfs."""
    with machine.worker("--read-only", "--tmpfs", "/tmp") as container:  # noqa: S108
        return f"{machine.job(container).status}: {container.line('success')}"


def rights(machine: Machine) -> str:
    """Root that may not become another: it goes on, with a warning."""
    said = machine.tool("run", "--rm", "--cap-drop", "ALL", IMAGE, "id", "-u")
    warnings = [line for line in said.splitlines() if line.startswith("WARNING: the worker stays root")]
    check(len(warnings) == 1 and "0" in said.splitlines(), said)  # in any order: docker has a pipe for each
    return warnings[0]


def alone(machine: Machine) -> str:
    """No RunPod, no network, no volume: says what it is and how to go on, draws, and says where the picture is.

    What it says to type works.
    """
    with machine.container("--network", "none", "--env", "MODEL_NAME=flux-shapes", IMAGE) as container:
        status = container.wait()
        check(status == 0, container.logs()[-2000:])
        container.line("RunPod is not here")
        picture, served = container.line("local_test.py --prompt"), container.line("--rp_api_host 0.0.0.0")
        for command in (picture, served):
            check("-e MODEL_NAME=flux-shapes" in command and "flux2-endpoint" in command, command)
        said = container.line("saved")
    folder = machine.folder / "typed"
    folder.mkdir()
    others = {"$PWD/outputs:": f"{folder}:", "huggingface:": f"{machine.volume()}:", "flux2-endpoint": IMAGE}
    typed = functools.reduce(lambda text, name: text.replace(name, others[name], 1), others, picture)
    machine.tool(*shlex.split(typed)[1:])
    check(list(folder.glob("*.png")), picture)
    return f"{said}; `{picture}` draws"


def pod(machine: Machine) -> str:
    """On a pod of RunPod's, which starts again what ends, the API is served."""
    variables = ["--env", "RUNPOD_POD_ID=pod", "--env", "MODEL_NAME=flux-shapes"]
    with machine.container("--publish", "127.0.0.1:8792:8000", *variables, IMAGE) as container:
        answer = first_picture("http://127.0.0.1:8792/runsync", container.logs)
        return f"{container.line('This is a pod')} POST /runsync: {answer}"


def own_volume(machine: Machine) -> str:
    """New volumes for HF_HOME and the pictures, root's or not, started as root and as 10001."""
    said = []
    for user in ("0", str(WORKER)):
        home, outputs = machine.volume(), machine.volume()
        mounts = ["--volume", f"{home}:/home/worker/huggingface", "--volume", f"{outputs}:/app/outputs"]
        own = [*mounts, "--user", user, "--env", "MODEL_NAME=flux-shapes"]
        wrote = machine.tool("run", "--rm", *own, IMAGE, "sh", "-c", 'id -u; touch "$HF_HOME/x" && echo kept')
        check(wrote.split() == [str(WORKER), "kept"], wrote)
        wrote = machine.tool("run", "--rm", *own, IMAGE, "python", "local_test.py", *SMALL)
        said += re.findall(r"saved .*", wrote)
    return "; ".join(said)


def host_folder(machine: Machine) -> str:
    """Folders of the host's for the pictures: root's, as docker makes them, and a user's, empty and with a picture.

    A user's remains theirs, and the pictures are too; what is downloaded is shared by all.
    """
    said = []
    downloads = machine.volume()
    for owner, files in ((0, 0), (0, 1), (1000, 0), (1000, 1)):
        folder = machine.folder / f"outputs-{owner}-{files}"
        folder.mkdir()
        for path in (*[folder / "1.png"][:files], folder):
            path.touch()
            os.chown(path, owner, owner)
        mounts = ["--volume", f"{folder}:/app/outputs", "--volume", f"{downloads}:/home/worker/huggingface"]
        options = [*mounts, "--env", "MODEL_NAME=flux-shapes", IMAGE]
        wrote = machine.tool("run", "--rm", *options, "sh", "-c", 'mkdir -p "$HF_HOME/hub" && touch "$HF_HOME/hub/$$"')
        wrote += machine.tool("run", "--rm", *options, "python", "local_test.py", *SMALL, "--seed", "1")
        picture, worker = folder / "1.png", owner or WORKER
        owners = (picture.stat().st_uid, folder.stat().st_uid)
        check(picture.stat().st_size and owners == (worker, worker), f"{owners}: {wrote}")
        said.append(f"of user {owner} with {files} files: the picture is user {owners[0]}'s")
    return "; ".join(said)


def unwritable_outputs(machine: Machine) -> str:
    """Where no picture can be saved that is said before the model is loaded."""
    folder = machine.folder / "unwritable"
    folder.mkdir()
    options = ["--volume", f"{folder}:/app/outputs", "--env", "MODEL_NAME=flux-shapes", "--user", str(WORKER)]
    done = machine.tool.attempt("run", "--rm", *options, IMAGE, "python", "local_test.py", *SMALL)
    line = done.stdout.strip()
    check(done.returncode == 1 and "cannot be written" in line and "model" not in line and "\n" not in line, line)
    return line


def roots_volume(machine: Machine) -> str:
    """RunPod's volume is root's: started as root, what the next worker can use is kept; as 10001 it is named."""
    volume = ["--volume", f"{machine.volume()}:/runpod-volume"]
    with machine.worker(*volume, "--user", str(WORKER), QUANTIZATION="fp8") as container:
        said = container.wait_for("/runpod-volume/quantized cannot be written")
        check("WARNING" in said and f"user {WORKER}" in said and "install -d -o" in said, said)
    with machine.worker(*volume, QUANTIZATION="fp8") as container:
        machine.job(container)
        kept = container.execute("ls", "/runpod-volume/quantized")
        check("-fp8-" in kept, kept)
    return f"as root it is kept; as {WORKER}: {said}"


def unwritable_home(machine: Machine) -> str:
    """HF_HOME where nobody can write."""
    machine.hub.repos["someone/small"] = Repo(SHAPES)
    volume = machine.volume()
    begun = time.monotonic()
    with machine.container("--network", "host", "--volume", f"{volume}:/kept:ro", "--env", "HF_HOME=/kept/hub",
                         "--env", "MODEL_NAME=someone/small", "--env", f"HF_ENDPOINT={machine.hub.url}",
                         IMAGE, "python", "local_test.py", *SMALL) as container:  # fmt: skip
        status = container.wait()
        return f"status {status} after {time.monotonic() - begun:.1f} s: {container.line('/kept/hub')}"


def tokens(machine: Machine) -> str:
    """A missing and a wrong token: the line, and how soon it comes."""
    machine.hub.repos["black-forest-labs/FLUX.1-dev"] = gated()
    said = []
    for token, words in (("", "is gated: accept its licence"), ("hf_expired", "the hub refuses HF_TOKEN")):
        begun = time.monotonic()
        environment = {"MODEL_NAME": "FLUX.1-dev", "HF_TOKEN": token, "HF_ENDPOINT": machine.hub.url}
        with machine.worker(**environment) as container:
            status = container.wait()
            check(status != 0, container.logs()[-2000:])
            check("hf_expired" not in container.logs(), "the token is in the log")
            said.append(f"status {status} after {time.monotonic() - begun:.1f} s: {container.line(words)}")
    return "; ".join(said)


def gated() -> Repo:
    """A repo that only TOKEN and what the README calls a token open."""
    closed = {None: (401, "GatedRepo"), "hf_other": (403, "GatedRepo")}
    return Repo(SHAPES, gate=closed)


def baked(machine: Machine) -> str:
    """A gated model in the image: it starts without a network, without a token, and after the repo is gone.

    A build that bakes it anew downloads no file again.
    """
    name = f"someone/gated-{os.getpid()}"  # a new one: the builder keeps what was downloaded
    machine.hub.repos[name] = gated()
    arguments = {"BAKE_MODEL": "Yes", "MODEL_NAME": name, "HF_ENDPOINT": machine.hub.url}
    words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    refused = machine.tool.build(f"{IMAGE}-refused", *words)
    check(refused.returncode != 0 and "is gated" in refused.stdout, refused.stdout[-2000:])
    built = machine.tool.build(BAKED, *words, "--secret", "id=HF_TOKEN,env=HF_TOKEN", HF_TOKEN=TOKEN)
    check(built.returncode == 0, built.stdout[-3000:])
    check(TOKEN not in built.stdout, "the token is in the build's log")
    check(TOKEN not in machine.tool("history", "--no-trunc", BAKED), "the token is in the history")
    check(TOKEN not in machine.tool("inspect", BAKED), "the token is in the image's configuration")
    check(not in_layers(machine.tool, BAKED, TOKEN.encode()), "the token is in a layer")
    asked = len(machine.hub.asked)
    again = machine.tool.build(f"{IMAGE}-refused", *words, "--build-arg", "MODEL_REVISION=main")
    check(again.returncode == 0 and f"{name} is in the image" in again.stdout, again.stdout[-3000:])
    files = [path for path, _ in machine.hub.asked[asked:] if "/resolve/" in path]
    check(len(machine.hub.asked) > asked and not files, f"asked for again: {files}")
    del machine.hub.repos[name]
    said = []
    for network in (["--network", "none"], ["--network", "host", "--env", f"HF_ENDPOINT={machine.hub.url}"]):
        asked = machine.hub.requests
        with machine.container(*network, BAKED, "python", "local_test.py", *SMALL) as container:
            check(container.wait() == 0, container.logs()[-2000:])
            said.append(container.line("saved"))
        check(machine.hub.requests == asked, "the hub was asked")
    return f"without a network: {said[0]}; with the repo gone: {said[1]}; the token is nowhere"


def in_layers(tool: Tool, image: str, secret: bytes) -> bool:
    """Whether any file of any layer holds `secret`."""
    with subprocess.Popen([tool.command, "save", image], stdout=subprocess.PIPE) as saved:
        assert saved.stdout
        last = b""
        while chunk := saved.stdout.read(1 << 24):
            if secret in last + chunk:
                saved.kill()
                return True
            last = chunk[-len(secret) :]
    return False


def api(machine: Machine) -> str:
    """The API on a port of the host's, and a picture from it."""
    command = [IMAGE, "python", "-u", "handler.py", "--rp_serve_api", "--rp_api_host", "0.0.0.0"]  # noqa: S104 - of the container
    port = ["--publish", "127.0.0.1:8791:8000"]
    with machine.container(*port, "--env", "MODEL_NAME=flux-shapes", *command) as container:
        return f"POST /runsync: {first_picture('http://127.0.0.1:8791/runsync', container.logs)}"


def first_picture(
    address: str, logs: Callable[[], str], seconds: float = 120, running: Callable[[], bool] = lambda: True
) -> str:
    """The status of the first answer, by what is `running`."""
    body = json.dumps({"input": {"prompt": "a red star", "seed": 1}}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                answer = json.load(response)
        except OSError:
            check(running() and time.monotonic() < deadline, logs()[-2000:])
            time.sleep(0.5)
        else:
            check(answer["output"]["images"], str(answer)[:500])
            return f"{answer['status']} with {len(answer['output']['images'][0])} characters of base64"


def compose_command(tool: Tool) -> list[str] | None:
    """That of docker, or the program of former days."""
    if tool.attempt("compose", "version").returncode == 0:
        return [tool.command, "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def readme_commands() -> list[str]:
    """The README's commands for containers, word for word."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    return [line for line in lines if re.match(r"mkdir |([A-Z_]+=\S+ )?docker ", line)]


def readme(machine: Machine) -> str:
    """Word for word, in a terminal; a `docker` of ours adds what this machine needs, and leaves out a card it lacks.

    So that nothing of that name is used, images, the volume and compose's project have names of this script's.
    """
    machine.hub.repos |= {f"black-forest-labs/FLUX.1-{name}": gated() for name in ("dev", "schnell")}
    programs = machine.folder / "bin"
    programs.mkdir()
    image, options = f"{IMAGE}-readme", [*machine.tool.build_options, "--build-arg", f"HF_ENDPOINT={machine.hub.url}"]
    arguments = dict(word.split("=", 1) for word in options if "=" in word)
    override = machine.folder / "compose.yaml"
    override.write_text(
        json.dumps({"services": {"cpu": {"image": f"{image}:cpu", "build": {"network": "host", "args": arguments}}}})
    )
    project = ["--file", "compose.yaml", "--file", str(override), "--project-name", f"{IMAGE}-{os.getpid()}"]
    run = shlex.join(["--network", "host", "--env", f"HF_ENDPOINT={machine.hub.url}"])
    composer, downloads = compose_command(machine.tool), machine.volume()
    shim = f"""#!/bin/sh
        verb=$1
        shift
        [ "$1 $2" = "--gpus all" ] && {"false" if has_card() else "shift 2"}
        case $verb in
            build) exec {machine.tool.command} build {shlex.join(options)} "$@" ;;
            run) exec {machine.tool.command} run {run} "$@" ;;
            compose) exec {shlex.join([*(composer or ["false"]), *project])} "$@" ;;
        esac
        exec {machine.tool.command} "$verb" "$@"
        """
    (programs / "docker").write_text(shim)
    (programs / "docker").chmod(0o755)
    environment = {**machine.tool.environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    said = [] if has_card() else ["(without --gpus all: there is no card)"]
    commands = readme_commands()
    check({"build", "run", "compose"} <= {word for command in commands for word in command.split()}, f"{commands}")
    for command in commands:
        begun = time.monotonic()
        shown = command.partition(" #")[0].strip()
        served = "http://127.0.0.1:8000/runsync" if " up" in command else ""
        if "compose" in command and composer is None:
            said.append(f"`{shown}` left out: there is no docker compose")
            continue
        typed = command.replace("flux2-endpoint", image).replace("-v huggingface:", f"-v {downloads}:")
        try:
            status, text = in_terminal(typed, environment, served)
        finally:
            if served and composer:
                call(*composer, *project, "--profile", "cpu", "down", "--volumes")
        check(status == 0, f"{command}: {text[-3000:]}")
        seen = re.findall(r"saved .*|\S+ is in the image: .*|POST /runsync: .*", text)
        check(seen or not re.search(r"docker run|BAKE|compose", command), text[-3000:])
        said.append(f"`{shown}` {time.monotonic() - begun:.0f} s: {seen[-1].strip() if seen else 'done'}")
    return "; ".join(said)


def in_terminal(command: str, environment: Mapping[str, str], serves: str = "") -> tuple[int, str]:
    """The status of a shell's command, and what it wrote into its terminal.

    What `serves` at an address is interrupted, as by Ctrl-C, once it has answered there, and its status is 0 then.
    """
    ours, its = pty.openpty()
    process = subprocess.Popen(
        ["/bin/sh", "-c", command], cwd=ROOT, env=dict(environment), stdin=its, stdout=its, stderr=its,
        start_new_session=True,
    )  # fmt: skip
    os.close(its)
    written = bytearray()

    def read() -> None:
        with suppress(OSError):  # the terminal's end
            while chunk := os.read(ours, 1 << 16):
                written.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    answer = ""
    try:
        if serves:
            answer = first_picture(serves, written.decode, 900, lambda: process.poll() is None)
    finally:
        if serves and process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        status = process.wait()
        reader.join()
        os.close(ours)
    text = written.decode(errors="replace").replace("\r", "\n")
    return (0, f"{text}\nPOST /runsync: {answer}") if answer else (status, text)


CASES: tuple[Callable[[Machine], str], ...] = (
    build, size, build_refused, job_as_root, job_as_worker, read_only, rights, alone, pod, own_volume,
    host_folder, unwritable_outputs, roots_volume, unwritable_home, tokens, baked, api, readme, terminated,
)  # fmt: skip


def main(command: str, *names: str) -> int:
    """Run the cases whose name holds one of `names`, or all; how many do not hold."""
    begun = time.monotonic()
    with ExitStack() as stack:
        tool = Tool(command)
        print(f"{command}: {tool('--version').strip()}", flush=True)
        base = base_image(tool)
        print(f"base image: {base or 'by its digest'} ({time.monotonic() - begun:.0f} s)", flush=True)
        tool.build_options += ["--network", "host", "--build-arg", f"TORCH={TORCH}"]
        if base:
            tool.build_options += ["--build-arg", f"BASE_IMAGE={base}"]
        if TORCH == "cpu" and (index := torch_index(stack)):
            tool.build_options += ["--build-arg", f"TORCH_CPU_INDEX={index}"]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        stand_in, hub = StandIn(), Hub()
        stack.callback(stand_in.close)
        stack.callback(hub.close)
        machine = Machine(tool, stand_in, hub, folder, [])
        failed = 0
        for case in CASES:
            if names and not any(name in case.__name__ for name in names):
                continue
            started = time.monotonic()
            try:
                outcome, said = "ok", case(machine)
            except (Failed, subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
                outcome, said = "FAILED", f"{type(error).__name__}: {error}"
                failed += 1
            print(f"{outcome:6} {time.monotonic() - started:6.1f} s  {case.__name__}: {said}", flush=True)
        for volume in machine.volumes:
            tool.attempt("volume", "rm", "--force", volume)
    print(f"{failed} failed, {time.monotonic() - begun:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
