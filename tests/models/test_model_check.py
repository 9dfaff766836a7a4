"""Models are compared with themselves: what is accepted trains on right numbers, what differs is refused."""

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model, inject_adapter_in_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from trl_opd import AccuracyCallback, OPDTrainer
from trl_opd.models.model_check import (
    LIMIT_FLOAT32,
    LIMIT_HALF,
    check_student,
    check_teacher,
    generates_padded,
    largest_difference,
)

from tests.helpers import reference
from tests.helpers.families import make_family, make_trainer, mean_kl, spread_logits
from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.tiny import AS_TRL, make_config, make_dataset, make_model, make_tokenizer
from tests.helpers.trainers import build, loss_and_gradient, reference_of

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def last_hidden_state(model, ids, mask, kept):
    model = getattr(model, "base_model", model)
    model = getattr(model, "model", model) if hasattr(model, "prefix") else model
    backbone = model.base_model if hasattr(model, "lm_head") else model
    return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]


def refusal(tmp_path, student=None, teacher=None, **changes) -> str:
    with pytest.raises(ValueError, match=r"^The (student|teacher|backbone of the) ") as caught:
        OPDTrainer(
            student or make_model(seed=0),
            teacher or make_model(seed=1),
            make_config(tmp_path, **changes),
            make_dataset(),
            processing_class=make_tokenizer(),
        )
    return str(caught.value)


# Families whose logits are capped or scaled after the head, whose state or positions padding would change, and whose
# configuration names a multiplier that is not used.
@pytest.mark.parametrize(
    ("family", "changes", "padded"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 5.0}, False),
        ("inkling_text", {"logits_mup_width_multiplier": 3.0}, True),
        ("mpt", {"logit_scale": 0.5}, True),
        ("falcon_h1", {"lm_head_multiplier": 0.3}, True),
        ("hyperclovax", {"logits_scaling": 0.3}, True),
        ("granite", {"logits_scaling": 3.0}, True),
        ("gemma2", {"final_logit_softcapping": 5.0}, True),
        ("rwkv", {}, False),
        ("deepseek_v4", {}, False),
        ("hunyuan_v1_dense", {}, True),
        ("openai-gpt", {}, True),
        ("ctrl", {}, True),
        ("gpt2", {}, True),
    ],
)
@pytest.mark.slow
def test_step_has_the_divergence_of_the_whole_models(tmp_path, family, changes, padded):
    trainer = make_trainer(tmp_path, make_family(family, **changes), make_family(family, seed=1, **changes))
    trainer.train()
    expected = mean_kl(trainer.first_student, trainer.teacher_model, trainer.batch)
    assert trainer.state.log_history[0]["kl/mean"] == pytest.approx(expected, rel=1e-4)
    assert trainer.student_traits.generates_padded == padded


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma"])
def test_rollouts_of_a_student_that_padding_changes_are_those_of_each_prompt_alone(tmp_path, family):
    student = make_family(family)
    trainer = make_trainer(tmp_path, student, make_family(family, seed=1), generation_kwargs={"do_sample": False})
    trainer.train()
    batch, student = trainer.batch, trainer.first_student.eval()
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()][None]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        alone = student.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert alone[0, prompt.shape[1] :].tolist() == completion.tolist()


@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "openai-gpt", "ctrl", "rwkv"])
@pytest.mark.parametrize("changes", [{}, AS_TRL], ids=["default", "as TRL"])
@pytest.mark.slow
def test_models_with_equal_weights_have_no_divergence(tmp_path, family, changes):
    trainer = make_trainer(tmp_path, make_family(family), make_family(family), **changes)
    trainer.train()
    line = trainer.state.log_history[0]
    assert abs(line["loss"]) < 1e-6
    assert abs(line["kl/mean"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 5.0}),
        ("inkling_text", {"logits_mup_width_multiplier": 3.0}),
        ("mpt", {"logit_scale": 0.5}),
        ("gpt2", {}),
        ("ctrl", {}),
    ],
)
def test_trls_loss_is_not_called_where_it_reads_the_head_otherwise_or_pads_wrongly(tmp_path, caplog, family, changes):
    models = [make_family(family, seed=seed, **changes) for seed in (0, 1)]
    trainer = make_trainer(tmp_path, *models, **AS_TRL)
    trainer.train()
    expected = mean_kl(trainer.first_student, trainer.teacher_model, trainer.batch)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert "TRL's own loss is not called" in caplog.text


class NormalisedHead(LlamaForCausalLM):
    """Normalises the rows of its head, as Baichuan 2 does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / self.lm_head.weight.norm(dim=-1)
        return output


class ScaledStates(LlamaForCausalLM):
    """Divides its hidden states before the head, as MiniCPM does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 4
        return output


class ShortLogits(LlamaForCausalLM):
    """Gives fewer logits than its head has rows."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :280]
        return output


class MeanOverAll(Qwen3ForCausalLM):
    """Is not causal: adds the mean of all embeddings to each."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))


class CountsPadding(Qwen3ForCausalLM):
    """Scales every state by the share of tokens in its row, so that padding on the right changes it."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(self._remember, with_kwargs=True)
        self.model.register_forward_hook(self._scale)

    def _remember(self, module, args, kwargs):
        self.share = kwargs["attention_mask"].float().mean(1)[:, None, None]

    def _scale(self, module, args, output):
        output.last_hidden_state = output.last_hidden_state * self.share
        return output


def family_of(kind: type, seed: int = 1) -> torch.nn.Module:
    config = make_model("llama" if issubclass(kind, LlamaForCausalLM) else "qwen3").config
    torch.manual_seed(seed)
    model = kind(config).eval()
    spread_logits(model)
    return model


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NormalisedHead, "do not give its own distribution"),
        (ScaledStates, "do not give its own distribution"),
        (ShortLogits, "gives logits for 280 vocabulary entries, and its LM head has 300 rows"),
        (MeanOverAll, "is not causal"),
        (CountsPadding, "padding on the right changes"),
    ],
)
def test_models_with_another_distribution_are_refused_with_the_difference(tmp_path, kind, reason, who):
    message = refusal(tmp_path, **{who: family_of(kind)})
    assert message.startswith(f"The {who} ({kind.__name__}) cannot be used: ")
    assert reason in message
    assert "Mean KL" in message or kind is ShortLogits


class CannotGenerate(Qwen3ForCausalLM):
    def generate(self, *args, **kwargs):
        raise KeyError("layer 3")


class OtherCache(Qwen3ForCausalLM):
    """Gives other logits while it generates."""

    def forward(self, *args, use_cache=None, **kwargs):
        output = super().forward(*args, use_cache=use_cache, **kwargs)
        output.logits = output.logits * (2 if use_cache else 1)
        return output


class AsksForImages(Qwen3ForCausalLM):
    def forward(self, *args, pixel_values=None, **kwargs):
        raise ValueError("You have to pass pixel_values")


class NoStates(Qwen3ForCausalLM):
    """Has a backbone that returns no hidden states, as the wrapper of a multimodal model may."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_hook(lambda *_: BaseModelOutput())


class WideHead(Qwen3ForCausalLM):
    """Widens its hidden states before the head."""

    def __init__(self, config):
        super().__init__(config)
        self.widen = torch.nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.lm_head = torch.nn.Linear(2 * config.hidden_size, config.vocab_size)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(self.widen(hidden)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (CannotGenerate, "The student (CannotGenerate) cannot generate: KeyError: 'layer 3'."),
        (OtherCache, "The student (OtherCache) cannot be used: `generate`, which keeps a cache, samples from other"),
        (AsksForImages, "The student (AsksForImages) cannot be run on token ids alone: ValueError: You have to pass"),
        (NoStates, "The backbone of the student (NoStates) cannot be run by itself: TypeError"),
        (WideHead, "The student (WideHead) cannot be used: its hidden states have width 32 and its LM head 64"),
    ],
)
def test_model_that_fails_in_the_check_is_refused_with_the_reason(tmp_path, kind, message):
    torch.manual_seed(1)
    assert refusal(tmp_path, kind(make_model().config)).startswith(message)


def test_process_without_the_weights_skips_the_check_and_says_so(caplog):
    with torch.device("meta"):
        model = make_model()
    assert check_student(model, last_hidden_state=last_hidden_state).starts_at_base
    assert check_teacher(model, last_hidden_state=last_hidden_state)
    assert caplog.text.count("does not hold all its weights") == 2


@pytest.mark.parametrize("family", ["modernbert-decoder", "bert", "roberta", "xlnet"])
def test_heads_of_encoders_are_refused(tmp_path, family):
    assert "cannot be used" in refusal(tmp_path, teacher=make_family(family))


def t5() -> torch.nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16))


def bart() -> torch.nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=300, **sizes, **heads))


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (t5, "T5ForConditionalGeneration, which is an encoder-decoder"),
        (bart, "BartForConditionalGeneration, which is an encoder-decoder"),
        (
            lambda: Qwen3ForSequenceClassification(make_model().config),
            "Qwen3ForSequenceClassification, which has no",
        ),
        (lambda: Qwen3Model(make_model().config), "Qwen3Model, which has no LM head"),
    ],
    ids=["T5", "BART", "classifier", "backbone"],
)
def test_models_that_are_no_causal_lm_are_refused_in_one_sentence(tmp_path, make, reason, who):
    message = refusal(tmp_path, **{who: make()})
    assert message.startswith(f"The {who} is a {reason}")
    assert "AutoModelForCausalLM" in message


@pytest.mark.parametrize("kind", [Qwen3ForSequenceClassification, Qwen3Model], ids=["classifier", "backbone"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_folders_of_such_models_are_refused_in_the_same_sentence(tmp_path, kind, who):
    kind(make_model().config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    message = refusal(tmp_path, **{who: str(tmp_path / "model")})
    assert message.startswith(f"The {who} is a {kind.__name__}, which has no LM head")


def test_bert_without_a_decoder_is_refused_as_a_teacher(tmp_path):
    model = make_family("bert", is_decoder=False)
    assert "cannot be used" in refusal(tmp_path, teacher=model)


def test_check_restores_modes_gradient_flags_weights_and_random_state():
    student = get_peft_model(make_model(), LoraConfig(**LORA))
    student.train()
    student.base_model.model.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    flags = [parameter.requires_grad for parameter in student.parameters()]
    weights = [parameter.detach().clone() for parameter in student.parameters()]
    drawn = torch.get_rng_state()
    traits = check_student(student, last_hidden_state=last_hidden_state, padded_left=True)
    assert traits.starts_at_base
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in student.modules()] == modes
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert all(map(torch.equal, weights, student.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "cohere", "opt"])
def test_half_precision_is_no_reason_to_refuse(family, dtype):
    model = make_model(family).to(dtype)
    spread_logits(model)
    assert check_student(model, last_hidden_state=last_hidden_state).generates_padded
    assert check_teacher(model, last_hidden_state=last_hidden_state, padded_left=True) == (family != "gpt2")


def test_products_in_tf32_have_the_limit_of_half_precision():
    model = make_model()
    assert largest_difference(model) == LIMIT_FLOAT32
    torch.set_float32_matmul_precision("high")
    try:
        assert largest_difference(model) == LIMIT_HALF
    finally:
        torch.set_float32_matmul_precision("highest")


# Adapters


def test_an_adapter_that_transformers_itself_put_on_the_head_is_refused(tmp_path):
    # What transformers' `add_adapter` does, which asks for a newer PEFT than the oldest that TRL takes.
    student = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), make_model())
    assert "adapter on its LM head" in refusal(tmp_path, student)


def test_an_activated_lora_is_refused(tmp_path):
    config = LoraConfig(**LORA, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    assert "activated LoRA" in refusal(tmp_path, get_peft_model(make_model(), config))


def test_trainable_weights_without_effect_are_refused(tmp_path):
    student = get_peft_model(make_model(), LoraConfig(**LORA))
    student.add_adapter("second", LoraConfig(**LORA))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("second" in name)  # the active adapter is the first
    assert "none of them changes its hidden states" in refusal(tmp_path, student)


class HeadInForward(Qwen3ForCausalLM):
    """Adds a trainable layer to the logits in its own forward."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Linear(1, config.vocab_size, bias=False)
        self.extra.weight.data.zero_()

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 100 * self.extra.weight[:, 0]
        return output


def test_trainable_weights_after_the_head_are_refused_although_they_are_zero_at_first(tmp_path):
    student = family_of(HeadInForward)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("extra" in name or "layers.0.mlp" in name)
    assert "act outside of the backbone" in refusal(tmp_path, student)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_dora=True),
        LoraConfig(**LORA, modules_to_save=["lm_head"]),
        LoraConfig(**LORA, trainable_token_indices=[5, 6]),
        LoraConfig(**LORA, init_lora_weights="pissa"),
        VeraConfig(r=4, target_modules=["q_proj"]),
    ],
    ids=["lora", "dora", "head saved", "tokens", "pissa", "vera"],
)
def test_adapters_that_the_backbone_sees_are_accepted(config):
    student = get_peft_model(make_model(), config)
    traits = check_student(student, last_hidden_state=last_hidden_state)
    assert traits.starts_at_base == (getattr(config, "init_lora_weights", True) != "pissa")


def test_student_without_trainable_weights_cannot_be_trained_but_studied(tmp_path):
    student = make_model().requires_grad_(False)
    trainer = OPDTrainer(
        student, make_model(seed=1), make_config(tmp_path), make_dataset(), processing_class=make_tokenizer()
    )
    with pytest.raises(ValueError, match="no trainable weights: pass `peft_config`"):
        trainer.train()


def test_first_gradient_of_zero_is_a_warning(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), make_model(seed=1))
    for parameter in trainer.model.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.warns(UserWarning, match="gradient of the first step is exactly 0"):
        trainer.train()


# Mixtures and ropes


def test_mixture_says_once_that_its_auxiliary_loss_is_not_trained(tmp_path, caplog):
    make_trainer(tmp_path, make_family("qwen3_moe"), make_family("qwen3_moe", seed=1))
    assert [record.message for record in caplog.records if "auxiliary" in record.message] == [
        "The student is a mixture of experts: its auxiliary (load-balancing) loss is not part of the loss."
    ]


def test_router_logits_are_not_asked_for_while_sampling(tmp_path):
    models = [make_family("mixtral", seed=seed, output_router_logits=True) for seed in (0, 1)]
    trainer = make_trainer(tmp_path, *models)
    trainer.train()
    assert trainer.student_traits.generates_padded
    assert trainer.model.config.output_router_logits


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rollouts_beyond_the_original_context_of_a_changing_rope_are_a_warning(tmp_path, rope_type):
    half = 8  # frequencies of a head of 16
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
    teacher = make_family("llama", seed=1, rope_parameters=rope, original_max_position_embeddings=32)
    trainer = make_trainer(tmp_path, make_model(), teacher)
    with pytest.warns(UserWarning, match=r"A rollout has \d\d tokens with its prompt, more than the 32 of"):
        trainer.train()


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["whole", "lora"])
def test_autocast_is_no_reason_to_refuse(tmp_path, peft_config):
    trainer = OPDTrainer(
        make_model(),
        make_model(seed=1),
        make_config(tmp_path, bf16=True),
        make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    assert trainer.student_traits.starts_at_base


def test_accuracy_and_probe_sample_a_student_that_padding_changes_as_alone(tmp_path):
    seen = []

    def reward(completions, **_):
        seen.append(list(completions))
        return [1.0] * len(completions)

    student = make_family("rwkv")
    texts = []
    for batch_size in (1, 8):
        trainer = make_trainer(tmp_path, student, make_family("rwkv", seed=1), per_device_eval_batch_size=batch_size)
        trainer.add_callback(AccuracyCallback(make_dataset(chat=False), reward))
        seen.clear()
        trainer.args.learning_rate = 0.0
        trainer.train()
        texts.append(seen[0])
    assert texts[0] == texts[1]
    assert not generates_padded(student)
    assert generates_padded(make_family("llama"))


TOKENS = [5, 6, 7, 40, 50]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", LoraConfig(**LORA, use_dora=True)),
        ("qwen3", LoraConfig(**LORA, modules_to_save=["lm_head"])),
        ("qwen3", LoraConfig(**LORA, trainable_token_indices={"lm_head": TOKENS})),
        ("qwen3_tied", LoraConfig(**LORA, trainable_token_indices=TOKENS)),
        ("qwen3_tied", LoraConfig(**LORA, modules_to_save=["embed_tokens"])),
        ("qwen3_tied", LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])),
        ("qwen3", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ],
    ids=["dora", "head", "tokens of the head", "tied tokens", "tied embeddings saved", "tied embeddings", "ia3"],
)
def test_gradients_of_an_adapter_are_those_of_the_whole_model(tmp_path, family, config):
    """The same values could come from weights that are read without their gradient."""
    trainer = build(tmp_path, student=make_model(family), peft_config=config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = make_inputs()
    _, expected = reference_of(trainer, inputs)
    _, found = loss_and_gradient(trainer, inputs)
    assert found.keys() == expected.keys()
    assert reference.relative_error(found, expected) < 1e-5
