"""Tiny models, a tokenizer, prompts and configs for the tests, made in memory."""

import json

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trl_opd import OPDConfig

# With these settings TRL computes the loss.
AS_TRL = {"token_statistics": False, "micro_batching": "trl"}
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
TEXT = [
    "So we add 3 and 4 to get 7. Wait, let me check: 3 + 4 = 7.",
    "A farmer has 12 eggs and sells 5. How many eggs are left?",
    "Let us multiply 6 by 7. First, 6 * 7 = 42. So the answer is 42.",
    "**Step 1**: read the question. **Step 2**: write the equation.",
]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PROMPTS = [
    "Add 3 and 4.",
    "How many eggs are left?",
    "Wait, check the equation.",
    "6 * 7 =",
    "Sell 5 eggs. First read the question.",
    "So the answer is",
    "Let us write step 2.",
    "A farmer has 12.",
]


def make_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 300 tokens and `extra` added ones."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT * 8, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(list(extra))
    return tokenizer


def make_model(family: str = "qwen3", *, seed: int = 0, rows: int = 300, width: int = 32, **changes) -> torch.nn.Module:
    """Return a random model of two layers whose logits are spread enough for divergences of about a nat."""
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    common = {"vocab_size": rows, "initializer_range": 0.2, **ids}
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    }
    opt = {"ffn_dim": 2 * width, "word_embed_proj_dim": width, "init_std": 0.2, "dropout": 0.0}
    half = {"head_dim": width // 2}
    families = {
        "qwen3": ("qwen3", {**sizes, **half, "tie_word_embeddings": False}),
        "qwen3_tied": ("qwen3", {**sizes, **half, "tie_word_embeddings": True}),
        "llama": ("llama", sizes),
        "gpt2": ("gpt2", {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 256}),
        "cohere": ("cohere", {**sizes, "logit_scale": 0.3}),
        "granite": ("granite", {**sizes, "logits_scaling": 2.0}),
        "gemma2": ("gemma2", {**sizes, **half, "final_logit_softcapping": 5.0}),
        "opt": ("opt", {**sizes, **opt}),
        "phi": ("phi", sizes),
    }
    model_type, fields = families[family]
    config = AutoConfig.for_model(model_type, **common | fields | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if family == "phi":  # the family whose LM head has a bias, which starts at zero
        torch.nn.init.normal_(model.lm_head.bias, std=0.5)
    return model


def make_dataset(rows: int = 8, *, chat: bool = True) -> Dataset:
    """Return `rows` prompts, as conversations or as plain text."""
    prompts = [PROMPTS[i % len(PROMPTS)] + " " * (i // len(PROMPTS)) for i in range(rows)]
    if chat:
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in prompts]})
    return Dataset.from_dict({"prompt": prompts})


def config_kwargs(output_dir, **changes) -> dict:
    """Return the settings of a short float32 run on the CPU, for TRL's config and ours."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
        **changes,
    }


def make_config(output_dir, **changes) -> OPDConfig:
    """Return an `OPDConfig` of a short float32 run on the CPU."""
    return OPDConfig(**config_kwargs(output_dir, **changes))


def save(path, *, seed, tokenizer=None, **changes) -> str:
    """Write a model and its tokenizer and return the path."""
    make_model("qwen3", seed=seed, **{"width": 64, **changes}).save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return str(path)


def swapped_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer with the ids of two tokens exchanged."""
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    one, other = sorted(vocab, key=vocab.get)[60:62]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    core = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")


def tokenizer_of(vocab: dict[str, int], name: str = "") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab)))
    tokenizer.name_or_path = name
    assert tokenizer.get_vocab() == vocab
    return tokenizer
