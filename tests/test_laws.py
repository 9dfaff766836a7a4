"""Laws 1 to 4 and 7 of docs/design.md, which must hold after every change."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import DistillationTrainer

from trl_opd import LMHead, OPDTrainer, token_weights, weighted_divergence
from trl_opd.loss.lm_head import lm_head, logit_scale

from tests.helpers import reference
from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import AS_TRL, make_model
from tests.helpers.trainers import (
    GREEDY,
    assert_close,
    assert_same_weights,
    build,
    loss_and_gradient,
    loss_positions,
    timeless,
    trained,
)

BETAS = [0.0, 0.25, 0.5, 1.0]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
# student, teacher: bias (phi), logit scale (cohere, granite), soft-capping (gemma2), tied and untied heads, a wider
# teacher and one of another family
PAIRS = {
    "qwen3": (("qwen3", {}), ("qwen3", {})),
    "tied": (("qwen3_tied", {}), ("qwen3_tied", {})),
    "wider": (("qwen3", {}), ("qwen3", {"width": 48})),
    "bias": (("phi", {}), ("phi", {})),
    "scale": (("cohere", {}), ("granite", {})),
    "softcap": (("gemma2", {}), ("gemma2", {"final_logit_softcapping": 3.0})),
    "other family": (("qwen3", {}), ("llama", {})),
    "lora": (("qwen3", {"lora": True}), ("qwen3", {})),
}


def make_pair(name):
    built = []
    for seed, (family, changes) in enumerate(PAIRS[name]):
        changes = dict(changes)
        lora = changes.pop("lora", False)
        model = make_model(family, seed=seed, **changes)
        built.append(get_peft_model(model, LoraConfig(**LORA)) if lora else model)
    return built


# Law 1: with nothing new set it trains as TRL's trainer does.


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.slow
def test_whole_run_is_bit_identical_to_trls(tmp_path, lora):
    runs = []
    for cls, settings in ((DistillationTrainer, {}), (OPDTrainer, AS_TRL)):
        adapter = LoraConfig(r=4, target_modules="all-linear") if lora else None
        runs.append(trained(tmp_path, cls=cls, peft_config=adapter, **settings))
    assert_same_weights(runs[0].model, runs[1].model)
    for line, mine in zip(runs[0].state.log_history, runs[1].state.log_history, strict=True):
        # The entropy is a mean over tokens here, and a mean of batch means there.
        same = {key: value for key, value in timeless(line).items() if "entropy" not in key}
        assert same == {key: mine[key] for key in same}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("pair", PAIRS)
def test_our_loss_and_gradients_equal_trls_on_the_same_rollouts(tmp_path, pair, beta):
    found = []
    # A rock set with uniform weights changes no number and takes our own path.
    ours = {"rock_set": rock_file(tmp_path / "rocks.json", [7])}
    for cls, new in ((DistillationTrainer, {}), (OPDTrainer, ours)):
        trainer = build(tmp_path, *make_pair(pair), cls=cls, beta=beta, temperature=1.3, **new)
        found.append(loss_and_gradient(trainer, make_inputs()))
    assert_close(found[1], found[0])


@pytest.mark.parametrize(("beta", "tools"), [(0.0, True), (0.25, False), (0.5, True), (1.0, False), (1.0, True)])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.slow
def test_weighted_loss_and_gradients_equal_the_float64_reference(tmp_path, pair, beta, tools):
    inputs = make_inputs(tools=tools)
    rocks = [inputs["completion_ids"][1, 0].item(), inputs["completion_ids"][1, 5].item()]
    weighting = {"token_weighting": "rock", "rock_weight": 0.3, "rock_window": 1}
    rock_set = rock_file(tmp_path / "rocks.json", rocks)
    trainer = build(tmp_path, *make_pair(pair), beta=beta, rock_set=rock_set, **weighting)
    mask = loss_positions(inputs).tolist()
    rows = reference.weights(inputs["completion_ids"].tolist(), set(rocks), 0.3, 1, mask)
    kept = [[w for w, inside in zip(ws, ms, strict=True) if inside] for ws, ms in zip(rows, mask, strict=True)]
    count = int(inputs["num_items_in_batch"])
    expected = reference.loss_and_gradient(*make_pair(pair), inputs, kept, count, beta=beta)
    trainer._position_weights.weigh(inputs, 0)
    assert_close(loss_and_gradient(trainer, inputs), expected)


# Law 2: the effect of a weight on its own position and on the others.


def random_case(n=41, widths=(13, 17), rows=(401, 401), seed=0, **head):
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n, width, generator=generator) for width in widths]
    heads = [
        LMHead(torch.randn(v, width, generator=generator), torch.randn(v, generator=generator), **head)
        for width, v in zip(widths, rows, strict=True)
    ]
    return hidden, heads, generator


def test_all_weights_one_equal_no_weights(tmp_path):
    rock_set = rock_file(tmp_path / "rocks.json", [7, 20, 33])
    found = []
    for weighting in ({}, {"token_weighting": "rock", "rock_weight": 1.0}):
        trainer = build(tmp_path, rock_set=rock_set, **weighting)
        inputs = make_inputs()
        trainer._position_weights.weigh(inputs, 0)
        found.append(loss_and_gradient(trainer, inputs))
    (loss, gradients), (weighted_loss, weighted_gradients) = found
    assert loss == weighted_loss
    assert all(torch.equal(gradients[name], weighted_gradients[name]) for name in gradients)


@pytest.mark.parametrize("beta", BETAS)
def test_weight_zero_removes_a_position_and_leaves_the_gradient_of_the_others(beta):
    hidden, heads, generator = random_case()
    weights = (torch.rand(41, generator=generator) > 0.3).float()
    gradients = []
    for w in (torch.ones(41), weights):
        student = hidden[0].clone().requires_grad_()
        loss, divergence, entropy = weighted_divergence(student, hidden[1], *heads, w, 41, beta=beta, temperature=1.0)
        loss.backward()
        gradients.append(student.grad)
        assert torch.equal(divergence.isnan(), w == 0)
        assert torch.equal(entropy.isnan(), w == 0)
        assert loss.item() == pytest.approx((divergence.nan_to_num() * w).sum().item() / 41, rel=1e-6)
    assert torch.all(gradients[1][weights == 0] == 0)
    torch.testing.assert_close(gradients[1][weights == 1], gradients[0][weights == 1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("weights", "denominator"),
    [(torch.ones(5), 0.0), (torch.zeros(5), 0.0), (torch.zeros(5), torch.tensor(0.0)), (torch.zeros(5), 5)],
)
def test_batch_without_positions_or_with_denominator_zero_trains_nothing(weights, denominator):
    hidden, heads, _ = random_case(n=5)
    student = hidden[0].clone().requires_grad_()
    settings = {"beta": 1.0, "temperature": 1.0}
    loss, divergence, _ = weighted_divergence(student, hidden[1], *heads, weights, denominator, **settings)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert divergence.isnan().all() == (weights.sum() == 0)


@pytest.mark.parametrize("normalization", ["tokens", "weights"])
def test_the_denominator_is_the_token_count_or_the_sum_of_the_weights(tmp_path, normalization):
    inputs = make_inputs()
    rocks = rock_file(tmp_path / "rocks.json", inputs["completion_ids"][0, :2].tolist())
    weighting = {"token_weighting": "rock", "rock_weight": 0.25, "weight_normalization": normalization}
    trainer = build(tmp_path, rock_set=rocks, **weighting)
    trainer._position_weights.weigh(inputs, 0)
    mask = inputs["completion_mask"].bool()
    rows = [w[m].tolist() for w, m in zip(inputs["weights"], mask, strict=True)]
    denominator = {"tokens": int(mask.sum()), "weights": inputs["weights"].sum().item()}[normalization]
    expected = reference.loss_and_gradient(trainer.model, trainer.teacher_model, inputs, rows, denominator)
    assert_close(loss_and_gradient(trainer, inputs), expected)


# Law 3: a weight acts on the position whose logits predict the token.


def bigram_pair(odd_id):
    """Return a student and a teacher whose predictions differ only right after `odd_id`, and see one token back."""
    student = make_model("qwen3", seed=0)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.model.embed_tokens.weight[odd_id].normal_()
    return student, teacher


@pytest.mark.parametrize(
    ("odd_id", "predicted", "tool_mask"),
    [
        (7, 21, None),
        (22, 23, None),
        (25, 26, None),
        (23, 24, [1, 1, 0, 1, 1, 1]),
        (21, 22, [1, 1, 0, 1, 1, 1]),
    ],
    ids=["first", "middle", "last", "after a tool token", "before a tool token"],
)
@pytest.mark.slow
def test_only_the_weight_of_the_predicted_token_acts(tmp_path, odd_id, predicted, tool_mask):
    inputs = make_inputs(prompts=((5, 6, 7),), lengths=(6,))
    inputs["completion_ids"][0] = torch.tensor([21, 22, 23, 24, 25, 26])
    if tool_mask is not None:
        inputs["tool_mask"] = torch.tensor([tool_mask])
        inputs["num_items_in_batch"] = torch.tensor(sum(tool_mask))
    for rock in range(21, 27):
        rocks = rock_file(tmp_path / f"{rock}.json", [rock])
        trainer = build(tmp_path, *bigram_pair(odd_id), token_weighting="rock", rock_set=rocks)
        batch = dict(inputs)
        trainer._position_weights.weigh(batch, 0)
        loss, gradients = loss_and_gradient(trainer, batch)
        size = sum(g.abs().sum().item() for g in gradients.values() if g is not None)
        if rock == predicted:
            assert loss == pytest.approx(0.0, abs=1e-7)
            assert size == pytest.approx(0.0, abs=1e-4)
        else:
            assert loss > 0.01
            assert size > 0.01


# Law 4: one batch, however it is cut. Several processes are compared with one in test_processes.py.


@pytest.mark.parametrize(("num_generations", "normalization"), [(1, "tokens"), (1, "weights"), (4, "tokens")])
@pytest.mark.slow
def test_four_by_one_equals_two_by_two_equals_one_by_four(tmp_path, num_generations, normalization):
    settings = {
        "weight_normalization": normalization,
        "num_generations": num_generations,
        "generation_kwargs": GREEDY,
        "token_weighting": "rock",
        "rock_set": rock_file(tmp_path / "rocks.json", range(60, 180)),
        "rock_weight": 0.5,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
    }
    before, runs = make_model(seed=0).state_dict(), []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = trained(tmp_path, **settings, **split)
        moved = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
        runs.append((trainer.state.log_history[0], moved))
    whole, expected = runs[0]
    for line, moved in runs[1:]:
        for key in ("loss", "kl/mean", "rock/token_share", "rock/mean_kl", "other/mean_kl", "weight/zero_share"):
            assert line[key] == pytest.approx(whole[key], rel=1e-5), key
        assert 0.0 < line["rock/token_share"] < 1.0
        assert reference.relative_error(moved, expected) < 1e-5


# Law 7: a divergence.


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.07}, {"softcap": 2.0}, {"logit_scale": 3.0, "softcap": 5.0}])
@pytest.mark.parametrize("shape", [(1, (1, 1), (2, 2)), (41, (13, 17), (401, 401)), (7, (16, 8), (300, 257))])
def test_divergence_equals_the_reference_at_odd_shapes(beta, head, shape):
    (hidden, heads, generator), temperature = random_case(*shape, **head), 0.7
    vocab, weights = min(shape[2]), torch.rand(shape[0], generator=generator)
    leaves = {"hidden": hidden[0].clone().requires_grad_(), "weight": heads[0].weight.clone().requires_grad_()}
    student_head = replace(heads[0], weight=leaves["weight"])
    settings = {"beta": beta, "temperature": temperature}
    loss, divergence, entropy = weighted_divergence(
        leaves["hidden"], hidden[1], student_head, heads[1], weights, 3.0, **settings
    )
    loss.backward()
    twins = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    twin_head = replace(heads[0], weight=twins["weight"])
    expected, entropies = [], []
    for student_state, teacher_state in zip(twins["hidden"], hidden[1], strict=True):
        student = reference.head_logits(student_state, twin_head)[:vocab] / temperature
        teacher = reference.head_logits(teacher_state, heads[1])[:vocab] / temperature
        expected.append(reference.divergence(student, teacher, beta))
        entropies.append(reference.entropy(student).detach())
    expected = torch.stack(expected)
    expected_loss = (expected * weights.double()).sum() / 3.0
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(divergence.double(), expected.detach(), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(entropy.double(), torch.stack(entropies), rtol=1e-4, atol=2e-6)
    found_gradients, gradients = ({name: leaf.grad for name, leaf in side.items()} for side in (leaves, twins))
    assert reference.relative_error(found_gradients, gradients) < 2e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_divergence_is_zero_for_equal_models_and_never_negative(beta, dtype):
    hidden, heads, _ = random_case(n=64, widths=(16, 16))
    heads = [LMHead(head.weight.to(dtype), head.bias.to(dtype)) for head in heads]
    hidden = [states.to(dtype) * 5 for states in hidden]
    ones = torch.ones(64)
    loss, itself, _ = weighted_divergence(
        hidden[0], hidden[0], heads[0], heads[0], ones, 64, beta=beta, temperature=1.0
    )
    assert loss.dtype == torch.float32
    assert itself.abs().max() <= 2e-5
    _, other, entropy = weighted_divergence(hidden[0], hidden[1], *heads, ones, 64, beta=beta, temperature=1.0)
    assert other.min() >= -1e-6
    assert torch.isfinite(other).all()
    assert torch.isfinite(entropy).all()


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_but_finite_logits_give_finite_values_and_gradients(beta):
    hidden, heads, _ = random_case(n=8, widths=(16, 16))
    student = (hidden[0] * 300).requires_grad_()
    loss, divergence, entropy = weighted_divergence(
        student, hidden[1] * -300, *heads, torch.ones(8), 8, beta=beta, temperature=0.1
    )
    loss.backward()
    assert all(torch.isfinite(value).all() for value in (loss, divergence, entropy, student.grad))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "phi", "cohere", "granite", "gemma2", "llama", "gpt2"])
def test_lm_head_computes_the_logits_of_the_model(family):
    model = make_model(family).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        logits = model(input_ids=ids).logits[0]
    head = lm_head(model)
    found = torch.stack([reference.head_logits(row, head) for row in hidden])
    torch.testing.assert_close(found.float(), logits, rtol=1e-4, atol=1e-5)
    assert head.logit_scale == logit_scale(model.config)


def test_token_weights_are_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        for window in (0, 1, 50):
            weights = token_weights(torch.tensor([[1, 2]]), [2], rock_weight=0.4, window=window)
            assert weights.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
