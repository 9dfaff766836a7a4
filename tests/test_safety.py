"""The package never runs code from a file, opens no connection on its own, and writes no secret to output or files."""

import ast
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import trl_opd

from tests.helpers.command_line import flags
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import PROMPTS, make_model, make_tokenizer

PACKAGE = Path(trl_opd.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# name of a call: why it may execute what a file holds
EXECUTING = {
    "eval": "code",
    "exec": "code",
    "compile": "code",
    "__import__": "code",
    "pickle.load": "pickle",
    "pickle.loads": "pickle",
    "torch.load": "pickle",
    "joblib.load": "pickle",
    "yaml.load": "objects; yaml.safe_load is not",
    "yaml.unsafe_load": "objects",
    "yaml.full_load": "objects",
    "os.system": "a shell",
    "os.popen": "a shell",
}
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# The source


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Return the calls of a module with the text of what is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def unsafe(source: str) -> list[str]:
    """Return what a module's source does that could execute somebody else's code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in UNPICKLING]
        if isinstance(node, ast.Constant | ast.keyword | ast.Dict):
            found += trusting(node)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in EXECUTING else []
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            asks = name.startswith("Auto") and name.endswith(".from_pretrained")
            found += [f"{name} without trust_remote_code"] if asks and not states_trust(given) else []
            found += [f"{name} through a shell"] if truthy(given.get("shell")) else []
            found += [f"{name} with allow_pickle"] if truthy(given.get("allow_pickle")) else []
    return found


def truthy(node: ast.expr | None) -> bool:
    return node is not None and not (isinstance(node, ast.Constant) and not node.value)


def states_trust(given: dict[str | None, ast.expr]) -> bool:
    """Return whether a call says it: transformers asks on the terminal where nothing is said."""
    return "trust_remote_code" in given or None in given


def trusting(node: ast.AST) -> list[str]:
    """Return where `trust_remote_code` is set to something that is true whatever the user said."""
    pairs = []
    if isinstance(node, ast.keyword):
        pairs = [(node.arg, node.value)]
    if isinstance(node, ast.Dict):
        pairs = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if is_text(key)]
    return [
        f"trust_remote_code={ast.unparse(value)}"
        for name, value in pairs
        if name == "trust_remote_code" and isinstance(value, ast.Constant) and value.value
    ]


def is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_executes_the_content_of_a_file(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import load",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(name)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
        "kwargs = {'trust_remote_code': True}",
    ],
)
def test_unsafe_source_is_found(source):
    assert unsafe(source)


# A folder with code of its own

CODE = """
import os, pathlib
pathlib.Path(os.environ["MARKER"]).touch()
from transformers import Qwen3Config, Qwen3ForCausalLM, PreTrainedTokenizerFast

class EvilConfig(Qwen3Config):
    model_type = "evil"

class EvilModel(Qwen3ForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def arm(folder: Path, *, model: bool = True, tokenizer: bool = True, known: bool = False) -> None:
    """Let a model's folder ask for code of its own, under a model type that transformers knows or does not."""
    (folder / "evil.py").write_text(CODE)
    if model:
        edit(folder / "config.json", auto_map=MAP, **({} if known else {"model_type": "evil"}))
    if tokenizer:
        edit(
            folder / "tokenizer_config.json",
            auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
            tokenizer_class="EvilTokenizer",
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Harmless models, a collection and a rock set of them, and folders that hold code of their own."""
    from trl_opd.cli import main

    folder = tmp_path_factory.mktemp("world")
    kinds = {"evil": {}, "evil_tokenizer": {"model": False}, "evil_known": {"known": True, "tokenizer": False}}
    for seed, name in enumerate(("student", "teacher", *kinds)):
        make_model("qwen3", seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        if name in kinds:
            arm(folder / name, **kinds[name])
    rows = [{"prompt": prompt, "answer": "7"} for prompt in PROMPTS]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rock_file(folder / "rocks.json", range(60, 90))
    collect = flags(folder, folder / "rollouts", max_completion_length=8, num_generations=2)
    assert main(["collect", *collect]) == 0
    return folder


def commands(world: Path, out: Path, evil: Path) -> dict[str, list[str]]:
    """Return the command lines that read the models or the tokenizer of a folder."""
    occurrences = world / "rollouts" / "occurrences.parquet"
    student, teacher = {"model_name_or_path": evil}, {"teacher_model_name_or_path": evil}
    probe = ["--dataset_name", str(world / "chats.jsonl"), "--candidates", "all", "--greedy", "--use_cpu"]
    probe += ["--max_completion_length", "4", "--num_prompts", "2", "--output", str(out / "knockout.json")]
    gradients = {"rock_set": world / "rocks.json", "dataset_name": None}
    table = ["--output", str(out / "gradients.parquet")]
    told = world / f"told of {evil.name}"  # a report looks for the tokenizer that the rock set names
    told.mkdir(exist_ok=True)
    known = {"name": str(evil), "vocab_size": 300, "fingerprint": "sha256:" + "0" * 64}
    rock_file(told / "rock_set.json", range(60, 90), tokenizer=known)
    return {
        "train, student": ["train", *flags(world, out, max_steps=1, **student)],
        "train, teacher": ["train", *flags(world, out, max_steps=1, **teacher)],
        "train, teacher's tokenizer": ["train", *flags(world, out, max_steps=1, teacher_tokenizer_name_or_path=evil)],
        "train, quantised teacher": ["train", *flags(world, out, max_steps=1, teacher_quantization="4bit", **teacher)],
        "collect, student": ["collect", *flags(world, out / "a", **student)],
        "collect, teacher": ["collect", *flags(world, out / "b", **teacher)],
        "collect, reference": ["collect", *flags(world, out / "c", reference_model_name_or_path=evil)],
        "probe": ["probe", "--model_name_or_path", str(evil), *probe],
        "gradients, student": ["gradients", str(occurrences), *table, *flags(world, out, **gradients, **student)],
        "gradients, teacher": ["gradients", str(occurrences), *table, *flags(world, out, **gradients, **teacher)],
        "fit": ["fit", *flags(world, out, **student, **teacher)[:4], "--gpu", "24GB"],
        "detect": ["detect", str(occurrences), "--output", str(out / "rocks.json"), "--tokenizer", str(evil)],
        "report": ["report", str(told), "--output", str(out / "report.html")],
    }


# Every command in one process each would take a minute per case: this runs all of them, and says what each did.
RUNNER = """
import contextlib, io, json, os, sys, traceback
from trl_opd.cli import main
found = {}
for name, argv in json.load(open(sys.argv[1])).items():
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        code = "".join(traceback.format_exception(error))[-2000:]
    lines = said.getvalue().strip().splitlines()
    found[name] = [code, lines[-1] if lines else "", os.path.exists(os.environ["MARKER"])]
json.dump(found, open(sys.argv[2], "w"))
"""


def run_all(world: Path, tmp_path: Path, evil: Path, stdin: str) -> dict[str, list]:
    """Run every command on a folder, with a terminal or a pipe that answers "y" to every question."""
    argvs, result, marker = tmp_path / "argv.json", tmp_path / "result.json", tmp_path / "marker"
    argvs.write_text(json.dumps(commands(world, tmp_path / "out", evil)))
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "MARKER": str(marker), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", RUNNER, str(argvs), str(result)]
    settings = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    if stdin == "pipe":
        done = subprocess.run(command, input="y\n" * 200, check=False, timeout=280, **settings)
    else:
        master, terminal = pty.openpty()
        os.write(master, b"y\n" * 200)
        done = subprocess.run(command, stdin=terminal, check=False, timeout=280, **settings)
        os.close(master)
        os.close(terminal)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(result.read_text())


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(("evil", "stdin"), [("evil", "terminal"), ("evil_tokenizer", "pipe"), ("evil_known", "pipe")])
def test_code_in_a_model_folder_is_never_executed_even_if_the_user_answers_yes(world, tmp_path, evil, stdin):
    found = run_all(world, tmp_path, world / evil, stdin)
    assert {name: executed for name, (_, _, executed) in found.items() if executed} == {}
    assert not (tmp_path / "modules" / "transformers_modules").exists() or not list(
        (tmp_path / "modules").rglob("evil.py")
    )
    for name, (code, last, _) in found.items():
        assert code in (0, 1), (name, code)
        if code == 1:
            assert last.startswith(f"trl-opd {name.split(',')[0]}: error: "), (name, last)
    if evil == "evil":  # a type that transformers does not know cannot be had without its code
        assert {name for name, (code, _, _) in found.items() if code == 0} <= {"report"}


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("evil", "load"),
    [
        ("evil", "AutoConfig.from_pretrained(sys.argv[1])"),
        ("evil_tokenizer", "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)"),
    ],
)
def test_code_in_a_model_folder_runs_if_it_is_trusted(world, tmp_path, evil, load):
    code = f"import sys; from transformers import AutoConfig, AutoTokenizer; {load}"
    marker = tmp_path / "marker"
    environment = {**os.environ, "MARKER": str(marker), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(world / evil)]
    subprocess.run(command, input="y\n", env=environment, text=True, check=True, capture_output=True, timeout=120)
    assert marker.exists()


# No connection is opened


NO_NETWORK = """
import json, socket, sys
tried = []
def refuse(*args, **kwargs):
    tried.append(repr(args[-1])[:200])
    raise OSError("no network in this test")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
import trl_opd
from trl_opd.cli import main
for name in trl_opd.__all__:
    getattr(trl_opd, name)
codes = [main(argv) for argv in json.load(open(sys.argv[1]))]
json.dump([codes, tried], open(sys.argv[2], "w"))
"""


@pytest.mark.processes
@pytest.mark.slow
def test_importing_fitting_detecting_and_reporting_open_no_connection(world, tmp_path):
    rocks = str(tmp_path / "rock_set.json")
    models = flags(world, tmp_path, teacher_model_name_or_path=world / "teacher")[:4]
    detect = ["detect", str(world / "rollouts" / "occurrences.parquet"), "--output", rocks, "--score", "aggregate"]
    argvs = [
        ["fit", *models, "--gpu", "24GB"],
        [*detect, "--top_k", "5", "--tokenizer", str(world / "student")],
        ["report", str(tmp_path)],
    ]
    (tmp_path / "argv.json").write_text(json.dumps(argvs))
    online = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_")}
    command = [sys.executable, "-c", NO_NETWORK, str(tmp_path / "argv.json"), str(tmp_path / "result.json")]
    done = subprocess.run(command, env=online, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "result.json").read_text()) == [[0, 0, 0], []]
    assert (tmp_path / "report.html").is_file()


# Secrets


@pytest.mark.processes
@pytest.mark.slow
def test_no_token_is_in_the_output_or_files_of_a_run_at_debug_level(world, tmp_path):
    of_environment, of_flag = "hf_" + "environmentSecret0123456789abcdefg", "hf_" + "flagSecret0123456789abcdefghijklmn"
    loud = {"log_level": "debug", "hub_token": of_flag, "log_completions": True, "save_steps": 1}
    verbose = {f"{name}_VERBOSITY": "debug" for name in ("TRANSFORMERS", "DATASETS", "HF_HUB", "DIFFUSERS")}
    environment = {**os.environ, **verbose, "HF_TOKEN": of_environment, "ACCELERATE_LOG_LEVEL": "DEBUG"}
    command = [sys.executable, "-m", "trl_opd", "train", *flags(world, tmp_path / "out", max_steps=1, **loud)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Trained 1 steps" in done.stdout
    assert "report: " not in done.stderr, "a progress bar in spite of disable_tqdm"
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"opd_run.json", "report.html", "README.md", "training_args.bin"} <= {path.name for path in files}
    for secret in (of_environment, of_flag):
        assert secret not in done.stdout + done.stderr
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
