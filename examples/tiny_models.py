"""Make a tiny tokenizer, teacher, student and prompts, to try every command of trl-opd on a laptop, offline.

    python examples/tiny_models.py --output_dir tiny
    python examples/tiny_models.py --output_dir tiny --questions gsm8k/train.jsonl

The first command generates word problems; the second one reads a file of JSON lines with `question` and `answer`, the
format of openai/gsm8k. Both train a Qwen3 teacher for a minute and a smaller student for a few seconds.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTH = 192  # tokens of a training text; longer texts are cut
PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eve")
THINGS = ("apples", "books", "coins", "eggs", "pens")
PAD = "<|endoftext|>"
EOS = "<|im_end|>"
SPECIAL = [PAD, "<|im_start|>", EOS]


def word_problems(count: int, seed: int) -> list[dict[str, str]]:
    """Return random word problems, each a `question` and an `answer` in two steps."""
    draw = random.Random(seed)
    problems = []
    for _ in range(count):
        who = draw.choice(PEOPLE)
        thing = draw.choice(THINGS)
        a = draw.randint(2, 30)
        b = draw.randint(2, 30)
        c = draw.randint(2, 30)
        if draw.random() < 0.5:
            total = a + b
            given = min(c, a)
            result = total - given
            question = f"{who} has {a} {thing} and buys {b} more. Then {who} gives away {given}. How many are left?"
            steps = f"First, {a} + {b} = {total} {thing}. Then {total} - {given} = {result}."
        else:
            packed = a * b
            result = packed + c
            question = f"{who} packs {a} boxes of {b} {thing} each, and {c} {thing} are left over. How many are there?"
            steps = f"The boxes hold {a} * {b} = {packed} {thing}. So there are {packed} + {c} = {result}."
        problems.append({"question": question, "answer": f"{steps}\n#### {result}"})
    return problems


def read_problems(path: Path) -> list[dict[str, str]]:
    """Return the problems of a file in GSM8K's format, without its calculator annotations."""
    problems = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            answer = re.sub(r"<<.*?>>", "", row["answer"])
            problems.append({"question": row["question"], "answer": answer})
    return problems


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with at most `size` tokens, trained on the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train_model(name: str, rows: list[list[int]], tokenizer, *, width: int, layers: int, steps: int, seed: int):
    """Return a Qwen3 model trained to predict the next token, on 16 texts in each step.

    Args:
        name (`str`): Name beside the progress bar.
        rows (`list[list[int]]`): Token ids of the texts.
        tokenizer (`PreTrainedTokenizerFast`): Gives the vocabulary size and the ids of end and padding.
        width (`int`): Hidden size.
        layers (`int`): Number of layers.
        steps (`int`): Number of steps.
        seed (`int`): Seed of the weights and of the choice of texts.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(seed)
    progress = trange(steps, desc=name)
    for step in progress:
        batch = [torch.tensor(ids) for ids in draw.sample(rows, 16)]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        loss = model(input_ids=ids, labels=labels).loss
        warmup = min(1.0, (step + 1) / 20)
        optimizer.param_groups[0]["lr"] = 3e-3 * warmup * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("tiny"))
    parser.add_argument("--questions", type=Path, help="JSON lines with `question` and `answer`")
    parser.add_argument("--teacher_steps", type=int, default=300)
    parser.add_argument("--student_steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    problems = read_problems(args.questions) if args.questions else word_problems(2000, args.seed)
    texts = []
    chats = []
    prompts = []
    for problem in problems:
        texts += [problem["question"], problem["answer"]]
        prompt = {"role": "user", "content": problem["question"]}
        chats.append([prompt, {"role": "assistant", "content": problem["answer"]}])
        prompts.append(json.dumps({"prompt": [prompt]}))
    tokenizer = make_tokenizer(texts, size=2048)
    ids = tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]
    rows = [row[:LENGTH] for row in ids]
    sizes = {
        "teacher": {"width": 128, "layers": 3, "steps": args.teacher_steps},
        "student": {"width": 64, "layers": 2, "steps": args.student_steps},
    }
    for name, size in sizes.items():
        model = train_model(name, rows, tokenizer, seed=args.seed, **size)
        model.save_pretrained(args.output_dir / name)
        tokenizer.save_pretrained(args.output_dir / name)
    (args.output_dir / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    print(f"Wrote {args.output_dir}/teacher, {args.output_dir}/student and {len(prompts)} prompts.")


if __name__ == "__main__":
    main()
