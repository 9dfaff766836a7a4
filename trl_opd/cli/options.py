"""What `--help` lists without importing torch; `tests/test_cli.py` compares it with the dataclass."""

# Option -> its default as the help shows it, and what it does.
OPD_OPTIONS = {
    "token_weighting": ("uniform", "which positions get rock_weight: uniform (none), rock, control or random"),
    "rock_set": ("none", "path or Hub repository of a rock set; required unless uniform"),
    "rock_weight": ("0.0", "weight of the chosen positions, in [0, 1]: 0 freezes them, 1 changes nothing"),
    "rock_window": ("0", "positions on each side of a rock that get the same weight"),
    "rock_exclude_pillars": ("false", "leave alone the rocks that `trl-opd probe` found to be pillars"),
    "weight_normalization": ("tokens", "divide by all tokens of the loss (as TRL), or by the sum of the weights"),
    "num_generations": ("1", "rollouts per prompt; divides the number of rollouts of an optimizer step"),
    "mask_truncated_completions": ("false", "leave rollouts that were cut at the length limit out of the loss"),
    "use_transformers_continuous_batching": ("false", "take rollouts from transformers' continuous batching engine"),
    "transformers_continuous_batching_config": ("none", "its settings, JSON; max_memory_percent is 0.5 unless given"),
    "micro_batching": ("tight", "tight (rollouts of like length together, trimmed) or trl (TRL's padding and split)"),
    "divergence_chunk_bytes": ("536870912", "memory for the divergence's rows of the vocabulary (not on CUDA)"),
    "token_statistics": ("true", "keep the divergence per token type, and write it into every checkpoint"),
    "save_occurrences": ("none", "write the rollouts of every N-th optimizer step, token by token"),
    "merge_adapter": ("false", "save and push a LoRA student as a whole model, in the place of its adapter"),
    "teacher_quantization": ("none", "quantise the teacher with bitsandbytes: 4bit or 8bit"),
    "teacher_placement": ("resident", "parked: the teacher's weights leave the GPU while nobody needs them"),
    "teacher_device": ("none", "another device for the teacher, such as cuda:1 or cpu"),
    "teacher_tokenizer_name_or_path": ("none", "tokenizer of the teacher, when its model does not name one"),
}


def table(options: dict[str, tuple[str, str]]) -> str:
    """Return one line per option: flag, default, meaning."""
    return "\n".join(f"  --{name:<40}{default:<10}{text}" for name, (default, text) in options.items())
