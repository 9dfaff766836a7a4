"""The pushes of saving/test_student.py, in a process whose Hub client has the address of a server on loopback."""

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_opd import AccuracyCallback, Controls, OPDTrainer, RockSet, RolloutSamples
from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.cli import main
from trl_opd.rocks.rock_set import Rock

from tests.helpers.hub_server import TOKEN, WRONG, HubServer
from tests.helpers.tiny import make_config, make_dataset, make_model, make_tokenizer

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
IDS = torch.tensor([[1, 87, 85, 274, 201, 40, 50]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


class Cases:
    """Every case writes into its own folder and returns plain values."""

    def __init__(self, hub: HubServer, folder: Path):
        self.hub = hub
        self.folder = folder
        self.tokenizer = make_tokenizer()
        self.found = {}
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(seconds / 100)  # the client waits up to 23 s before it gives up

    def run(self) -> dict:
        self.push_base()
        for kind in ("full", "lora", "qlora", "merged"):
            self.found[kind] = self.push(kind)
        self.refused()
        self.cut()
        self.lost_push()
        self.command_line()
        self.found["files with a token"] = self.with_token()
        return self.found

    def push_base(self) -> None:
        """Push base, teacher and rock set to the Hub, from where the runs load them."""
        for name, seed in (("base", 0), ("teacher", 1)):
            make_model(seed=seed, width=64).save_pretrained(self.folder / name)
            self.tokenizer.save_pretrained(self.folder / name)
            files = {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}
            self.hub.commit(f"user/{name}", files, "A model")
        rocks = [Rock(id, self.tokenizer.decode([id]), 10, 0.5, 5.0) for id in range(60, 160)]
        rock_set = RockSet(
            rocks=rocks,
            tokenizer={"name": None, "vocab_size": 300, "fingerprint": fingerprint(self.tokenizer)},
            measure={"divergence": "reverse_kl", "temperature": 1.0},
            method={"score": "aggregate", "top_k": 100},
            corpus={"rollouts": 10, "tokens": 3000, "kl_sum": 900.0},
            controls=Controls([200, 201], 0.5, False),
        )
        rock_set.push_to_hub("user/rocks")
        self.found["rocks on the Hub"] = [rock.id for rock in RockSet.load("user/rocks").rocks]

    def trainer(self, kind: str, **changes) -> OPDTrainer:
        changes = {"max_steps": 1, "push_to_hub": True, "hub_model_id": f"user/{kind}", "hub_token": TOKEN} | changes
        callbacks = [RolloutSamples(1)]
        if kind == "lora":
            changes |= {"token_weighting": "rock", "rock_set": "user/rocks"}
        if kind == "full":
            changes |= {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
        if kind == "qlora":
            problems = make_dataset(3).add_column("answer", ["7", "8", "9"])
            callbacks.append(AccuracyCallback(problems, self.reward))
        return OPDTrainer(
            model=changes.pop("model", "user/base"),
            teacher_model="user/teacher",
            args=make_config(self.folder / "runs" / kind, merge_adapter=kind == "merged", **changes),
            train_dataset=make_dataset(),
            processing_class=self.tokenizer,
            quantization_config=FOUR_BIT if kind == "qlora" else None,
            peft_config=LORA if kind in ("lora", "qlora", "merged") else None,
            callbacks=callbacks,
        )

    @staticmethod
    def reward(completions, answer, **_):
        return [float("7" in str(one)) for one in completions]

    def push(self, kind: str) -> dict:
        trainer = self.trainer(kind)
        trainer.train()
        want = logits(trainer.model)
        trainer.push_to_hub()
        repo = f"user/{kind}"
        load = AutoPeftModelForCausalLM if kind in ("lora", "qlora") else AutoModelForCausalLM
        quantised = {"quantization_config": FOUR_BIT} if kind == "qlora" else {}  # as the card says
        got = logits(load.from_pretrained(repo, dtype=torch.float32, **quantised))
        base = logits(make_model(seed=0, width=64))
        files = self.hub.files(repo)
        found = {
            "files": sorted(files),
            "card": files["README.md"].decode(),
            "messages": self.hub.messages(repo),
            "difference": float((got - want).abs().max()),
            "difference_to_base": float((got - base).abs().max()),
        }
        if "rock_set.json" in files:
            found["rocks"] = [rock["id"] for rock in json.loads(files["rock_set.json"])["rocks"]]
        return found

    def refused(self) -> None:
        try:
            self.trainer("refused", hub_token=WRONG)
        except OSError as error:
            self.found["wrong token"] = {"error": str(error)}

    def cut(self) -> None:
        trainer = self.trainer("cut", model="user/full")
        trainer.train()
        folder = self.folder / "runs" / "cut"
        self.hub.cut("commit", always=True)
        found = {"steps": trainer.state.global_step}
        try:
            trainer.push_to_hub()
        except OSError as error:
            found["error"] = str(error)
        found["local"] = self.local(folder)
        self.hub.mend()
        trainer.push_to_hub()
        found |= {"local after": self.local(folder), "pushed after": "model.safetensors" in self.hub.files("user/cut")}
        self.found["cut"] = found

    @staticmethod
    def local(folder: Path) -> dict[str, int]:
        """Return the files of a folder that a push must not change, with their sizes."""
        kept = ("model.safetensors", "tokenizer.json", "token_stats.safetensors", "rollout_samples.parquet")
        return {name: (folder / name).stat().st_size for name in kept}

    def lost_push(self) -> None:
        trainer = self.trainer("lost", save_strategy="steps", save_steps=1, max_steps=2)
        self.hub.cut("commit", always=True)
        # `catch_warnings` is not safe beside threads that use it too, as the pushes do (before Python 3.14).
        texts = []
        with mock.patch("warnings.warn", lambda message, *args, **kwargs: texts.append(str(message))):
            trainer.train()
        self.hub.mend()
        self.found["lost push"] = {"warnings": texts, "steps": trainer.state.global_step}

    def command_line(self) -> None:
        prompts = self.folder / "prompts.jsonl"
        Dataset.to_json(make_dataset(), str(prompts))
        common = ["train", "--model_name_or_path", "user/base", "--teacher_model_name_or_path", "user/teacher"]
        common += ["--dataset_name", str(prompts), "--use_cpu", "--bf16", "false", "--max_steps", "1"]
        common += ["--max_completion_length", "8", "--per_device_train_batch_size", "2", "--report_to", "none"]
        common += ["--save_strategy", "no", "--push_to_hub", "--gradient_checkpointing", "false"]
        for name, repo, token in (
            ("command line", "user/cli", TOKEN),
            ("command line: wrong token", "user/refused", WRONG),
        ):
            folder = self.folder / "runs" / name.replace(": ", "-")
            argv = [*common, "--output_dir", str(folder), "--hub_model_id", repo, "--hub_token", token]
            sys.argv = ["trl-opd", *argv]  # what the record of the run takes the command from
            errors = io.StringIO()
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                code = main(argv)
            lines = [line for line in errors.getvalue().splitlines() if line.startswith("trl-opd train: error:")]
            self.found[name] = {"code": code, "error": "\n".join(lines)}
        self.found["command line"] |= {
            "files": sorted(self.hub.files("user/cli")),
            "messages": self.hub.messages("user/cli"),
        }

    def with_token(self) -> list[str]:
        """Return every file, here and on the Hub, that holds a token."""
        tokens = [token.encode() for token in (TOKEN, WRONG)]
        paths = [path for path in (self.folder / "runs").rglob("*") if path.is_file()]
        found = [str(path) for path in paths if any(token in path.read_bytes() for token in tokens)]
        for repo in list(self.hub.repos):
            files = self.hub.files(repo)
            found += [f"{repo}/{name}" for name, data in files.items() if any(token in data for token in tokens)]
        return found
