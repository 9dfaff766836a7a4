"""Make a tiny tokenizer, teacher, student and prompts, so that every command here can be tried on a laptop, offline.

    python examples/tiny_models.py --output_dir tiny
    python examples/tiny_models.py --output_dir tiny --questions gsm8k/train.jsonl

The first line writes word problems of its own; the second takes a file of JSON lines with `question` and `answer`, as
openai/gsm8k has them. Both train a Qwen3-shaped teacher for a minute and a smaller student for some seconds.
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
LENGTH = 192  # tokens of a training text; longer ones are cut


def word_problems(count: int, seed: int) -> list[dict[str, str]]:
    """Return problems with worked answers, each a `question` and an `answer`."""
    draw = random.Random(seed)
    people, things = ("Ada", "Ben", "Cleo", "Dan", "Eve"), ("apples", "books", "coins", "eggs", "pens")
    problems = []
    for _ in range(count):
        who, thing, a, b, c = draw.choice(people), draw.choice(things), *(draw.randint(2, 30) for _ in range(3))
        if draw.random() < 0.5:
            question = f"{who} has {a} {thing} and buys {b} more. Then {who} gives away {min(c, a)}. How many are left?"
            steps = f"First, {a} + {b} = {a + b} {thing}. Then {a + b} - {min(c, a)} = {a + b - min(c, a)}."
            result = a + b - min(c, a)
        else:
            question = f"{who} packs {a} boxes of {b} {thing} each, and {c} {thing} are left over. How many are there?"
            steps = f"The boxes hold {a} * {b} = {a * b} {thing}. So there are {a * b} + {c} = {a * b + c}."
            result = a * b + c
        problems.append({"question": question, "answer": f"{steps}\n#### {result}"})
    return problems


def read_problems(path: Path) -> list[dict[str, str]]:
    """Return the problems of a file in GSM8K's format, without its calculator marks."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"question": row["question"], "answer": re.sub(r"<<.*?>>", "", row["answer"])} for row in lines]


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `size` tokens trained on the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=special[0], eos_token=special[2], padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train_model(name: str, rows: list[list[int]], tokenizer, *, width: int, layers: int, steps: int, seed: int):
    """Return a Qwen3 model trained on token ids by next-token prediction, 16 texts a step."""
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
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
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
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in problems
    ]
    tokenizer = make_tokenizer([message["content"] for chat in chats for message in chat], size=2048)
    rows = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][:LENGTH] for chat in chats]
    sizes = {
        "teacher": {"width": 128, "layers": 3, "steps": args.teacher_steps},
        "student": {"width": 64, "layers": 2, "steps": args.student_steps},
    }
    for name, size in sizes.items():
        model = train_model(name, rows, tokenizer, seed=args.seed, **size)
        model.save_pretrained(args.output_dir / name)
        tokenizer.save_pretrained(args.output_dir / name)
    lines = [json.dumps({"prompt": chat[:1]}) for chat in chats]
    (args.output_dir / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Wrote {args.output_dir}/teacher, {args.output_dir}/student and {len(lines)} prompts.")


if __name__ == "__main__":
    main()
