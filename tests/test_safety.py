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
# Calls that execute code which a file may hold, unpickle it, or start a shell.
EXECUTING = {
    *("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "torch.load", "joblib.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
}
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# The source


def unsafe(source: str) -> list[str]:
    """Return what a module's source does that could execute somebody else's code."""
    found = []
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            imported.append(node.module or "")
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            found += always_trusting(dict(zip(keys, node.values, strict=True)))
        elif isinstance(node, ast.Call):
            found += unsafe_call(ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords})
    return found + [name for name in imported if name.split(".")[0] in UNPICKLING]


def unsafe_call(name: str, given: dict[str | None, ast.expr]) -> list[str]:
    """Return what is unsafe about a call with these keyword arguments."""
    found = always_trusting(given)
    if name in EXECUTING:
        found.append(name)
    # transformers asks on the terminal if the call does not say whether it trusts the folder.
    loads = name.startswith("Auto") and name.endswith(".from_pretrained")
    if loads and not given.keys() & {"trust_remote_code", None}:
        found.append(f"{name} without trust_remote_code")
    for keyword in ("shell", "allow_pickle"):
        value = given.get(keyword, ast.Constant(False))
        if not isinstance(value, ast.Constant) or value.value:
            found.append(f"{name} with {keyword}")
    return found


def always_trusting(given: dict) -> list[str]:
    """Return whether `trust_remote_code` is set to a constant that is true whatever the user said."""
    value = given.get("trust_remote_code")
    return ["trusts remote code"] if isinstance(value, ast.Constant) and value.value else []


def test_no_module_executes_the_content_of_a_file():
    found = {path.relative_to(PACKAGE): unsafe(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


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


# Model folders that contain code

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
EVIL = {"evil": {}, "evil_tokenizer": {"model": False}, "evil_known": {"known": True, "tokenizer": False}}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add_code(folder: Path, *, model: bool = True, tokenizer: bool = True, known: bool = False) -> None:
    """Let a model's folder ask for its own code, with a model type that transformers knows or does not know."""
    (folder / "evil.py").write_text(CODE)
    if model:
        edit(folder / "config.json", auto_map=MAP, **({} if known else {"model_type": "evil"}))
    if tokenizer:
        classes = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
        edit(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="EvilTokenizer")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Harmless models, a collection and a rock set of them, and three folders that contain code."""
    from trl_opd.cli import main

    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("student", "teacher", *EVIL)):
        make_model("qwen3", seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, parts in EVIL.items():
        add_code(folder / name, **parts)
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
    tokenizer = {"teacher_tokenizer_name_or_path": evil}
    probe = ["--dataset_name", str(world / "chats.jsonl"), "--candidates", "all", "--greedy", "--use_cpu"]
    probe += ["--max_completion_length", "4", "--num_prompts", "2", "--output", str(out / "knockout.json")]
    gradients = {"rock_set": world / "rocks.json", "dataset_name": None}
    table = ["--output", str(out / "gradients.parquet")]
    report = out / "report"  # a report looks for the tokenizer that the rock set names
    report.mkdir(parents=True)
    known = {"name": str(evil), "vocab_size": 300, "fingerprint": "sha256:" + "0" * 64}
    rock_file(report / "rock_set.json", range(60, 90), tokenizer=known)
    # Without a log and statistics, the report of a training has few plots to draw.
    short = {"max_steps": 1, "save_strategy": "no", "logging_strategy": "no", "token_statistics": "false"}
    train = {
        "train, student": student,
        "train, teacher": teacher,
        "train, teacher's tokenizer": tokenizer,
        "train, quantised teacher": {"teacher_quantization": "4bit", **teacher},
    }
    return {name: ["train", *flags(world, out / name, **short, **changes)] for name, changes in train.items()} | {
        "collect, student": ["collect", *flags(world, out / "a", **student)],
        "collect, teacher": ["collect", *flags(world, out / "b", **teacher)],
        "collect, reference": ["collect", *flags(world, out / "c", reference_model_name_or_path=evil)],
        "probe": ["probe", "--model_name_or_path", str(evil), *probe],
        "gradients, student": ["gradients", str(occurrences), *table, *flags(world, out, **gradients, **student)],
        "gradients, teacher": ["gradients", str(occurrences), *table, *flags(world, out, **gradients, **teacher)],
        "fit": ["fit", *flags(world, out, **student, **teacher)[:4], "--gpu", "24GB"],
        "detect": ["detect", str(occurrences), "--output", str(out / "rocks.json"), "--tokenizer", str(evil)],
        "report": ["report", str(report), "--output", str(out / "report.html")],
    }


# Runs the commands on each folder in one process, because each process takes seconds to start. After that the folder is
# loaded with trust, or with the question whether to trust it: its code must run then.
RUNNER = """
import contextlib, io, json, os, pathlib, sys, traceback
import transformers
from trl_opd.cli import main

def run(argv, marker):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        code = "".join(traceback.format_exception(error))[-2000:]
    lines = said.getvalue().strip().splitlines()
    return code, lines[-1] if lines else "", marker.exists()

for folder, commands in json.load(open(sys.argv[1])).items():
    folder = pathlib.Path(folder)
    marker = folder / "code-ran"
    os.environ["MARKER"] = str(marker)
    found = {name: run(argv, marker) for name, argv in commands.items()}
    modules = pathlib.Path(os.environ["HF_MODULES_CACHE"]).rglob("evil.py")
    copied = [str(path) for path in modules if folder.name in path.parts]
    trust = {} if folder.name == "evil" else {"trust_remote_code": True}
    with contextlib.suppress(Exception):
        transformers.AutoConfig.from_pretrained(folder, **trust)
        transformers.AutoTokenizer.from_pretrained(folder, **trust)
    if folder.name == "evil_known":
        transformers.AutoModelForCausalLM.from_pretrained(folder, **trust)
    (folder / "result.json").write_text(json.dumps([found, copied, marker.exists()]))
"""


@pytest.fixture(scope="module")
def outcomes(world, tmp_path_factory) -> dict[str, list]:
    """What every command did with each folder, where a terminal (`evil`) or a pipe answers "y" to every question."""
    folder = tmp_path_factory.mktemp("outcomes")
    for names in (["evil"], ["evil_tokenizer", "evil_known"]):
        argvs = {str(world / name): commands(world, folder / name, world / name) for name in names}
        (folder / "argv.json").write_text(json.dumps(argvs))
        master, terminal = pty.openpty()
        os.write(master, b"y\n" * 200)
        answers = {"stdin": terminal} if names == ["evil"] else {"input": "y\n" * 200}
        environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
        command = [sys.executable, "-c", RUNNER, str(folder / "argv.json")]
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, env=environment, check=False, timeout=280, **answers, **output)
        os.close(master)
        os.close(terminal)
        assert done.returncode == 0, done.stderr[-2000:]
    return {name: json.loads((world / name / "result.json").read_text()) for name in EVIL}


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("evil", EVIL)
def test_code_in_a_model_folder_is_never_executed_even_if_the_user_answers_yes(outcomes, evil):
    found, copied, runs_if_trusted = outcomes[evil]
    assert {name: executed for name, (_, _, executed) in found.items() if executed} == {}
    assert copied == []
    assert runs_if_trusted
    for name, (code, last, _) in found.items():
        assert code in (0, 1), (name, code)
        if code == 1:
            assert last.startswith(f"trl-opd {name.split(',')[0]}: error: "), (name, last)
    if evil == "evil":  # transformers does not know this model type without the folder's code
        assert {name for name, (code, _, _) in found.items() if code == 0} <= {"report"}


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
