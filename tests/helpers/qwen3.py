"""The public configurations of Qwen3, without weights."""

from transformers import Qwen3Config

# The public configurations of Qwen3: hidden width, layers, heads, intermediate width, tied; weights in billions, and
# gigabytes in 4 bits (docs of the models; DECISIONS, "Teacher").
REAL = {
    "0.6B": ((1024, 28, 16, 3072, True), 0.60, 0.54),
    "1.7B": ((2048, 28, 16, 6144, True), 1.72, 1.35),
    "4B": ((2560, 36, 32, 9728, True), 4.02, 2.65),
    "8B": ((4096, 36, 32, 12288, False), 8.19, 6.07),
    "14B": ((5120, 40, 40, 17408, False), 14.77, 9.9),
    "32B": ((5120, 64, 64, 25600, False), 32.76, 19.2),
}


def real_config(name) -> Qwen3Config:
    width, layers, heads, intermediate, tied = REAL[name][0]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
    )


def save_config(path, name) -> str:
    real_config(name).save_pretrained(path / name)
    return str(path / name)
