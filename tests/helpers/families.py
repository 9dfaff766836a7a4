"""Tiny random models of every causal family of transformers, whose logits are spread as those of a trained model."""

import copy

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_opd import OPDTrainer

from tests.helpers.tiny import make_config, make_dataset, make_tokenizer

WIDTH = 64
VOCAB = 300  # the tokenizer's
LARGEST = 40_000_000  # with more parameters a model is not tiny
SPREAD = 6.0  # standard deviation of the logits: with less, soft caps do not show

# Names of sizes in configurations, and their tiny values.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("lru_width", "embedding_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    "moe_intermediate_size": 32,
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "index_n_heads": 2,
    "index_topk": 256,
    "state_size": 8,
    "time_step_rank": 4,
    **{"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8},
    # Mamba 2 and Zamba 2
    **{"n_mamba_heads": 4, "mamba_headdim": 32, "mamba_ngroups": 1, "n_groups": 1},
    **{"rotary_dim": 8, "unpadded_vocab_size": VOCAB, "output_embedding_size": WIDTH, "input_embedding_size": WIDTH},
    **{"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True, "initializer_range": 0.1},
    # A head that is the embedding would let every token predict itself.
    "tie_word_embeddings": False,
}
# Fields that are set although the default is None.
UNSET = ("head_dim", "num_key_value_heads")
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
# What single families need beside it.
SPECIAL = {
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "local"]},
    "inkling_text": {"vocab_size": VOCAB + 20, "unpadded_vocab_size": VOCAB},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"topk_method": "greedy"},
    "dots1": {"moe_intermediate_size": 32, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "rwkv": {"attention_hidden_size": WIDTH},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "xmod": {"default_language": "en_XX"},
}


def families() -> list[str]:
    """Return the model types of all causal language models of transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_family(model_type: str, *, seed: int = 0, **changes) -> torch.nn.Module:
    """Return a tiny random model of a family.

    Args:
        model_type (`str`): Name of the family.
        seed (`int`): Seed of its weights.
        changes: Further fields of its configuration.

    Raises:
        Exception: of any type, if it cannot be built so small.
    """
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = _tiny_config(model_type, changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    if model.generation_config is not None:
        model.generation_config.eos_token_id = 2
        model.generation_config.pad_token_id = 0
    spread_logits(model)
    return model


@torch.no_grad()
def spread_logits(model: torch.nn.Module) -> None:
    """Scale the head so that logits have the spread of a trained model's before any cap."""
    head = model.get_output_embeddings()
    hidden = {}
    hook = head.register_forward_pre_hook(lambda _, inputs: hidden.update(states=inputs[0]))
    ids = torch.arange(20, 60)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hook.remove()
    spread = torch.nn.functional.linear(hidden["states"], head.weight).float().std()
    head.weight.mul_(SPREAD / spread)


def _tiny_config(model_type: str, changes: dict):
    """Return a configuration with the tiny sizes that it knows, and with `changes` as they are."""
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    asked = SPECIAL.get(model_type, {}) | changes
    errors = []
    for build in (_from_fields, _by_assignment):
        try:
            config = build(config_class, asked)
            with torch.device("meta"):
                getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
            return config
        except Exception as error:  # configurations and models raise errors of many types
            errors.append(error)
    raise errors[0]


def _known_sizes(config) -> dict:
    """Return the tiny sizes of the fields that a configuration has, without dropout and other noise of training."""
    found = {}
    for name, value in SIZES.items():
        try:
            known = getattr(config, name, None) is not None or (name in UNSET and hasattr(config, name))
        except Exception:  # transformers' error for fields that vary by layer
            known = True
        if known:
            found[name] = value
    for name, value in vars(config).items():
        is_noise = "drop" in name or "jitter" in name
        if is_noise and isinstance(value, float):
            found[name] = 0.0
    if hasattr(config, "qk_rope_head_dim"):
        found.pop("head_dim", None)
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    return found


def _from_fields(config_class, asked: dict):
    default = config_class()
    text = default.get_text_config()
    fields = _known_sizes(text) | asked
    if text is default:
        return config_class(**fields)
    name = next(name for name, value in vars(default).items() if value is text)
    return config_class(**{name: {**fields, "model_type": text.model_type}})


def _by_assignment(config_class, asked: dict):
    config = config_class()
    text = config.get_text_config()
    for part in [config] if text is config else [config, text]:
        for name, value in (_known_sizes(part) | asked).items():
            try:
                setattr(part, name, value)
            except Exception:  # a property, or a field that varies by layer
                continue
        for name in LAYER_KINDS:
            kinds = getattr(part, name, None)
            if isinstance(kinds, (list, tuple)):
                _shorten_layers(part, name, list(dict.fromkeys(kinds)))
    return config


def _shorten_layers(config, name: str, kinds: list[str]) -> None:
    """Leave a layer of each kind, two at least."""
    count = max(2, len(kinds))
    try:
        setattr(config, name, (kinds * count)[:count])
        for layers in ("num_hidden_layers", "n_layer", "num_layers"):
            if hasattr(config, layers):
                setattr(config, layers, count)
    except AttributeError:  # the configuration derives its kinds
        return


class FirstBatch(OPDTrainer):
    """Keeps the first generation batch, and the student as it was."""

    batch = None

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.batch is None:
            self.batch = batch
            self.first_student = copy.deepcopy(self.model)
        return batch


@torch.no_grad()
def mean_kl(student: torch.nn.Module, teacher: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Return the mean KL(student ‖ teacher) per token by the models' own forwards, each rollout alone, unpadded."""
    values = []
    for row in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        log_p, log_q = (
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
            for model in (student, teacher)
        )
        log_p = log_p.double().log_softmax(-1)
        log_q = log_q.double().log_softmax(-1)
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(values).mean())


def make_trainer(folder, student: torch.nn.Module, teacher: torch.nn.Module, **changes) -> FirstBatch:
    """Return a trainer that takes one step on eight rollouts of unequal prompts."""
    config = make_config(
        folder,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_completion_length=12,
        save_strategy="no",
        **changes,
    )
    return FirstBatch(student, teacher, config, make_dataset(), processing_class=make_tokenizer())
