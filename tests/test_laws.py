"""Laws 1 to 4 and 7 of docs/design.md, which must hold after every change."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import DistillationConfig, DistillationTrainer

from trl_opd import LMHead, OPDConfig, OPDTrainer, token_weights, weighted_divergence
from trl_opd.loss.lm_head import lm_head, logit_scale

from tests.helpers import reference
from tests.helpers.padded_rollouts import make_inputs
from tests.helpers.paths import ROOT
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import AS_TRL, config_kwargs, make_config, make_dataset, make_model
from tests.helpers.trainers import loss_and_gradient

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


def make_trainer(cls, student, teacher, tokenizer, path, **changes):
    config = (OPDConfig if cls is OPDTrainer else DistillationConfig)(**config_kwargs(path, **changes))
    return cls(
        model=student, teacher_model=teacher, args=config, train_dataset=make_dataset(), processing_class=tokenizer
    )


# Law 1: with nothing new set it trains as TRL's trainer does.


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.slow
def test_whole_run_is_bit_identical_to_trls(tokenizer, tmp_path, lora):
    runs = []
    for cls in (DistillationTrainer, OPDTrainer):
        settings = config_kwargs(tmp_path / cls.__name__)
        ours = cls is OPDTrainer
        trainer = cls(
            model=make_model(seed=0),
            teacher_model=make_model(seed=1),
            args=OPDConfig(**settings, **AS_TRL) if ours else DistillationConfig(**settings),
            train_dataset=make_dataset(),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        )
        trainer.train()
        runs.append(trainer)
    theirs, ours = ({**dict(trainer.model.named_parameters())} for trainer in runs)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    for line, mine in zip(runs[0].state.log_history, runs[1].state.log_history, strict=True):
        # The entropy is a mean over tokens here, and a mean of batch means there.
        other = ("time", "per_second", "entropy")
        timeless = {key: value for key, value in line.items() if not any(part in key for part in other)}
        assert timeless == {key: mine[key] for key in timeless}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("pair", PAIRS)
def test_our_loss_and_gradients_equal_trls_on_the_same_rollouts(tokenizer, tmp_path, pair, beta):
    found = []
    # A rock set with uniform weights changes no number and takes our own path.
    ours = {"rock_set": rock_file(tmp_path / "rocks.json", [7])}
    for cls, new in ((DistillationTrainer, {}), (OPDTrainer, ours)):
        trainer = make_trainer(cls, *make_pair(pair), tokenizer, tmp_path, beta=beta, temperature=1.3, **new)
        found.append(loss_and_gradient(trainer, make_inputs()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert reference.relative_error(found[1][1], found[0][1]) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("tools", [False, True])
def test_weighted_loss_and_gradients_equal_the_float64_reference(tokenizer, tmp_path, pair, beta, tools):
    inputs = make_inputs(tools=tools)
    rocks = [inputs["completion_ids"][1, 0].item(), inputs["completion_ids"][1, 5].item()]
    student, teacher = make_pair(pair)
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    rows = reference.weights(inputs["completion_ids"].tolist(), set(rocks), 0.3, 1, mask.tolist())
    kept = [[w for w, inside in zip(ws, ms, strict=True) if inside] for ws, ms in zip(rows, mask.tolist(), strict=True)]
    expected = reference.loss_and_gradient(student, teacher, inputs, kept, int(mask.sum()), beta=beta)
    trainer = make_trainer(
        OPDTrainer,
        student,
        teacher,
        tokenizer,
        tmp_path,
        beta=beta,
        token_weighting="rock",
        rock_weight=0.3,
        rock_window=1,
        rock_set=rock_file(tmp_path / "rocks.json", rocks),
    )
    trainer._position_weights.weigh(inputs, 0)
    loss, gradients = loss_and_gradient(trainer, inputs)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert reference.relative_error(gradients, expected[1]) < 1e-5


# Law 2: the effect of a weight on its own position and on the others.


def random_case(n=41, widths=(13, 17), rows=(401, 401), seed=0, **head):
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(n, width, generator=generator) for width in widths]
    heads = [
        LMHead(torch.randn(v, width, generator=generator), torch.randn(v, generator=generator), **head)
        for width, v in zip(widths, rows, strict=True)
    ]
    return hidden, heads, generator


def test_all_weights_one_equal_no_weights(tokenizer, tmp_path):
    losses = []
    for weighting in ({}, {"token_weighting": "rock", "rock_weight": 1.0}):
        rocks = rock_file(tmp_path / "rocks.json", [7, 20, 33])
        trainer = make_trainer(OPDTrainer, *make_pair("qwen3"), tokenizer, tmp_path, rock_set=rocks, **weighting)
        inputs = make_inputs()
        trainer._position_weights.weigh(inputs, 0)
        losses.append(loss_and_gradient(trainer, inputs))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(losses[0][1][name], losses[1][1][name]) for name in losses[0][1])


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


def test_batch_with_denominator_zero_trains_nothing():
    hidden, heads, _ = random_case(n=5)
    student = hidden[0].clone().requires_grad_()
    loss, *_ = weighted_divergence(student, hidden[1], *heads, torch.ones(5), 0.0, beta=1.0, temperature=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("which", [0, 1])
def test_hidden_states_and_head_of_unequal_width_are_an_error(which):
    hidden, heads, _ = random_case(n=5)
    hidden[which] = hidden[which][:, 1:]
    with pytest.raises(ValueError, match=f"The {('student', 'teacher')[which]}'s hidden states have width"):
        weighted_divergence(*hidden, *heads, torch.ones(5), 5, beta=1.0, temperature=1.0)


def test_batch_without_positions_has_loss_zero_and_a_backward():
    hidden, heads, _ = random_case(n=5)
    for weights, denominator in ((torch.zeros(5), 0.0), (torch.zeros(5), torch.tensor(0.0)), (torch.zeros(5), 5)):
        student = hidden[0].clone().requires_grad_()
        loss, divergence, _ = weighted_divergence(
            student, hidden[1], *heads, weights, denominator, beta=1.0, temperature=1.0
        )
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(student.grad, torch.zeros_like(student))
        assert divergence.isnan().all()


@pytest.mark.parametrize("normalization", ["tokens", "weights"])
def test_the_denominator_is_the_token_count_or_the_sum_of_the_weights(tokenizer, tmp_path, normalization):
    inputs = make_inputs()
    rocks = inputs["completion_ids"][0, :2].tolist()
    trainer = make_trainer(
        OPDTrainer,
        *make_pair("qwen3"),
        tokenizer,
        tmp_path,
        token_weighting="rock",
        rock_weight=0.25,
        weight_normalization=normalization,
        rock_set=rock_file(tmp_path / "rocks.json", rocks),
    )
    trainer._position_weights.weigh(inputs, 0)
    mask = inputs["completion_mask"].bool()
    rows = [w[m].tolist() for w, m in zip(inputs["weights"], mask, strict=True)]
    denominator = {"tokens": int(mask.sum()), "weights": inputs["weights"].sum().item()}[normalization]
    expected = reference.loss_and_gradient(trainer.model, trainer.teacher_model, inputs, rows, denominator)
    found = loss_and_gradient(trainer, inputs)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert reference.relative_error(found[1], expected[1]) < 1e-5


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


@pytest.mark.parametrize("place", ["first", "middle", "last", "after a tool token", "before a tool token"])
def test_only_the_weight_of_the_predicted_token_acts(tokenizer, tmp_path, place):
    inputs = make_inputs(prompts=((5, 6, 7),), lengths=(6,))
    inputs["completion_ids"][0] = torch.tensor([21, 22, 23, 24, 25, 26])
    odd_id, predicted = {
        "first": (7, 21),
        "middle": (22, 23),
        "last": (25, 26),
        "after a tool token": (23, 24),
        "before a tool token": (21, 22),
    }[place]
    if "tool" in place:
        inputs["tool_mask"] = torch.tensor([[1, 1, 0, 1, 1, 1]])
        inputs["num_items_in_batch"] = torch.tensor(5)
    values = {}
    for rock in range(21, 27):
        path = rock_file(tmp_path / f"{rock}.json", [rock])
        trainer = make_trainer(
            OPDTrainer, *bigram_pair(odd_id), tokenizer, tmp_path, token_weighting="rock", rock_set=path
        )
        batch = dict(inputs)
        trainer._position_weights.weigh(batch, 0)
        values[rock], gradients = loss_and_gradient(trainer, batch)
        size = sum(g.abs().sum().item() for g in gradients.values() if g is not None)
        if rock == predicted:
            assert values[rock] == pytest.approx(0.0, abs=1e-7)
            assert size == pytest.approx(0.0, abs=1e-4)
        else:
            assert values[rock] > 0.01
            assert size > 0.01


# Law 4: one batch, however it is cut.


@pytest.mark.parametrize("num_generations", [1, 4])
@pytest.mark.slow
def test_four_by_one_equals_two_by_two_equals_one_by_four(tokenizer, tmp_path, num_generations):
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = make_config(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_generations=num_generations,
            generation_kwargs={"do_sample": False},
            token_weighting="rock",
            rock_set=rock_file(tmp_path / "rocks.json", range(60, 180)),
            rock_weight=0.5,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer = OPDTrainer(
            model=make_model(seed=0),
            teacher_model=make_model(seed=1),
            args=config,
            train_dataset=make_dataset(),
            processing_class=tokenizer,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
        runs.append((trainer.state.log_history[0], moved))
    for line, moved in runs[1:]:
        for key in ("loss", "kl/mean", "rock/token_share", "rock/mean_kl", "other/mean_kl", "weight/zero_share"):
            assert line[key] == pytest.approx(runs[0][0][key], rel=1e-5), key
        assert 0.0 < line["rock/token_share"] < 1.0
        assert reference.relative_error(moved, runs[0][1]) < 1e-5


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_rollouts(tmp_path):
    script = ROOT / "tests" / "helpers" / "train_on_processes.py"
    environment_of_one = [sys.executable, str(script)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    commands = {1: environment_of_one, 2: [*launch, str(script)]}
    found = {}
    for count, command in commands.items():
        out = tmp_path / f"{count}.json"
        run = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        found[count] = json.loads(out.read_text())
    assert found[2]["processes"] == 2
    for key, value in found[1]["log"].items():
        assert found[2]["log"][key] == pytest.approx(value, rel=1e-5), key
    assert [line["eval_accuracy_problems"] for line in found[1]["accuracy"]] == [5, 5]
    for one, two in zip(found[1]["accuracy"], found[2]["accuracy"], strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert found[2]["samples"] > 0
    assert sum(found[1]["stats"]["seen"]) > 0
    for name, values in found[1]["stats"].items():
        exact = {} if name in ("seen", "count") else {"rel": 1e-5, "abs": 1e-9}
        assert found[2]["stats"][name] == (pytest.approx(values, **exact) if exact else values), name
    assert found[2]["occurrences"] == found[1]["occurrences"]
    assert [kl is None for kl in found[2]["kl"]] == [kl is None for kl in found[1]["kl"]]
    measured = [np.array(found[count]["kl"], dtype=float) for count in (1, 2)]
    np.testing.assert_allclose(*measured, rtol=1e-4, atol=1e-6)
    one, two = (torch.tensor(found[count]["moved"], dtype=torch.float64) for count in (1, 2))
    assert torch.linalg.norm(two - one) / torch.linalg.norm(one) < 1e-5


# Law 7: a divergence.


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.07}, {"softcap": 2.0}, {"logit_scale": 3.0, "softcap": 5.0}])
@pytest.mark.parametrize("shape", [(1, (1, 1), (2, 2)), (41, (13, 17), (401, 401)), (7, (16, 8), (300, 257))])
def test_divergence_equals_the_reference_at_odd_shapes(beta, head, shape):
    (hidden, heads, generator), temperature = random_case(*shape, **head), 0.7
    vocab, weights = min(shape[2]), torch.rand(shape[0], generator=generator)
    leaves = [hidden[0].clone().requires_grad_(), heads[0].weight.clone().requires_grad_()]
    student_head = LMHead(leaves[1], heads[0].bias, heads[0].logit_scale, heads[0].softcap)
    found = weighted_divergence(
        leaves[0], hidden[1], student_head, heads[1], weights, 3.0, beta=beta, temperature=temperature
    )
    found[0].backward()
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    twin_head = LMHead(twins[1], heads[0].bias, heads[0].logit_scale, heads[0].softcap)
    rows = [
        (
            reference.head_logits(twins[0][n], twin_head)[:vocab] / temperature,
            reference.head_logits(hidden[1][n], heads[1])[:vocab] / temperature,
        )
        for n in range(shape[0])
    ]
    expected = torch.stack([reference.divergence(*row, beta) for row in rows])
    loss = (expected * weights.double()).sum() / 3.0
    loss.backward()
    assert found[0].item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(found[1].double(), expected.detach(), rtol=1e-4, atol=2e-6)
    entropies = torch.stack([reference.entropy(row[0]) for row in rows]).detach()
    torch.testing.assert_close(found[2].double(), entropies, rtol=1e-4, atol=2e-6)
    found_gradients = {"hidden": leaves[0].grad, "weight": leaves[1].grad}
    assert reference.relative_error(found_gradients, {"hidden": twins[0].grad, "weight": twins[1].grad}) < 2e-5


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


@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("rock_weight", [0.0, 0.4])
def test_token_weights_are_float32_whatever_the_default_dtype(window, rock_weight):
    torch.set_default_dtype(torch.float64)
    try:
        assert token_weights(torch.tensor([[1, 2]]), [2], rock_weight=rock_weight, window=window).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
